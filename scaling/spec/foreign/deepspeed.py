"""DeepSpeed's own config JSON (https://www.deepspeed.ai/docs/config-json/; defaults as of DeepSpeed 0.19)."""

from typing import Any

from scaling.spec.foreign.common import put_batch, put_clip, put_offload, put_zero_defaults
from scaling.spec.foreign.deepspeed_keys import DEEPSPEED, STAGE_3
from scaling.spec.foreign.draft import Draft, draft_of, finish, leave
from scaling.spec.foreign.values import as_list, as_section, wrong

_ZERO = "zero_optimization."
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def read_deepspeed(document: dict[str, Any], processes: int | None) -> tuple[dict[str, Any], list[str]]:
    """Values and notes of a DeepSpeed config for `processes` ranks (None: the file does not say)."""
    draft = draft_of(DEEPSPEED, document)
    whole, micro, accumulation = (draft.whole(key) for key in _BATCH)
    if accumulation is None and (whole is None) != (micro is None) and not draft.auto.intersection(_BATCH):
        accumulation = 1  # DeepSpeedConfig._set_batch_related_parameters
    put_batch(draft, _BATCH, (whole, micro, accumulation), processes)
    put_precision(draft)
    put_zero(draft)
    put_optimizer(draft)
    put_schedule(draft)
    params = as_section((as_section(document.get("scheduler")) or {}).get("params")) or {}
    if draft.has("schedule") and "warmup_type" not in params:
        draft.lose("scheduler.params.warmup_type", "absent, it is log, and the warm-up of spec.json is linear")
    put_clip(draft, "gradient_clipping")
    draft.default("max_grad_norm", None, "gradient_clipping")
    leave(draft, ("schedule", "activation_checkpointing", "seed", "checkpoint", "validation"), "the script")
    return finish(draft)


def put_precision(draft: Draft) -> None:
    """bf16, fp16, or fp32 where neither is on."""
    names = [name for name in ("bf16", "fp16") if draft.flag(f"{name}.enabled")]
    if len(names) == 2:
        raise wrong("fp16.enabled", "false where bf16.enabled is true", True)
    draft.move("precision", names[0] if names else None)
    draft.default("precision", "fp32", "bf16.enabled", "fp16.enabled")


def put_zero(draft: Draft) -> None:
    """The backend: ZeRO, or at stage 0 DDP, which does the same."""
    stage = draft.whole(f"{_ZERO}stage") or 0
    if not 0 <= stage <= 3:
        raise wrong(f"{_ZERO}stage", "0, 1, 2 or 3", stage)
    if stage == 0:
        draft.put("backend.kind", "ddp")
        for key in [key for key in draft.given if key.startswith(_ZERO) and key != f"{_ZERO}stage"]:
            draft.lose(key, "nothing is sharded at ZeRO stage 0, which becomes `ddp`")
        return
    draft.put("backend", {"kind": "deepspeed", "zero_stage": stage})
    draft.move("backend.overlap_comm", draft.flag(f"{_ZERO}overlap_comm"))
    draft.move("backend.reduce_bucket_size", draft.whole(f"{_ZERO}reduce_bucket_size"))
    at_one_and_two = {f"{_ZERO}allgather_bucket_size": "backend.allgather_bucket_size"}
    for key, path in (at_one_and_two if stage < 3 else STAGE_3).items():
        draft.move(path, draft.whole(key))
    for key in STAGE_3 if stage < 3 else at_one_and_two:
        if key in draft.given:
            draft.lose(key, f"DeepSpeed ignores it at stage {stage}")
    devices = (f"{_ZERO}offload_optimizer.device", f"{_ZERO}offload_param.device")
    paths = (f"{_ZERO}offload_optimizer.nvme_path", f"{_ZERO}offload_param.nvme_path")
    put_offload(draft, stage, devices, paths)
    put_zero_defaults(draft, stage, _ZERO)


def put_optimizer(draft: Draft) -> None:
    """AdamW, which DeepSpeed's type Adam is as well (its adam_w_mode is on by default)."""
    kind = draft.text("optimizer.type")
    if kind is None:
        leave(draft, ("optimizer.betas", "optimizer.eps", "optimizer.weight_decay"), "the script")
        return
    draft.put("optimizer.kind", "adamw")
    if kind.lower() not in ("adam", "adamw"):
        draft.lose("optimizer.type", f"it is {kind}, and spec.json knows adamw alone, which stands in its place")
    betas = draft.get("optimizer.params.betas")
    if betas is not None and len(as_list(betas) or []) != 2:
        raise wrong("optimizer.params.betas", "two numbers", betas)
    draft.move("optimizer.betas", betas)
    for name in ("lr", "eps", "weight_decay"):
        draft.move(f"optimizer.{name}", draft.number(f"optimizer.params.{name}"))
    # deepspeed/ops/adam/fused_adam.py
    for name, value in (("lr", 1e-3), ("betas", [0.9, 0.999]), ("eps", 1e-8), ("weight_decay", 0.0)):
        keys = (f"optimizer.params.{name}", *(("scheduler.params.warmup_max_lr",) if name == "lr" else ()))
        if not any(key in draft.given for key in keys):
            draft.default(f"optimizer.{name}", value, *keys)


def put_schedule(draft: Draft) -> None:
    """The schedule, the peak that WarmupLR and WarmupDecayLR set, and the length, which stands nowhere else."""
    kind = draft.text("scheduler.type")
    if kind is None:
        return
    if kind not in _SCHEDULES:
        for key in [key for key in draft.given if key.startswith("scheduler.")]:
            draft.lose(key, f"spec.json knows {', '.join(_SCHEDULES)} of DeepSpeed's schedulers; set `schedule`")
        return
    name = "scheduler.params."
    draft.put("schedule.kind", _SCHEDULES[kind])
    draft.move("schedule.warmup_steps", draft.whole(f"{name}warmup_num_steps"))
    draft.default("schedule.warmup_steps", 1000, f"{name}warmup_num_steps")
    _put_peak(draft, kind)
    steps = draft.whole(f"{name}total_num_steps")
    if kind == "WarmupLR":
        if steps is not None:
            draft.lose(f"{name}total_num_steps", "WarmupLR has no end; set `max_steps`")
    elif steps is not None:
        draft.put("max_steps", steps)
        draft.notes.append(
            f"`{name}total_num_steps` becomes `max_steps`: that training ends with the schedule is assumed"
        )
    if kind == "WarmupCosineLR":
        draft.move("schedule.min_lr_ratio", draft.number(f"{name}cos_min_ratio"))
        draft.default("schedule.min_lr_ratio", 0.0001, f"{name}cos_min_ratio")
    elif f"{name}cos_min_ratio" in draft.given:
        draft.lose(f"{name}cos_min_ratio", f"{kind} does not have it")


def _put_peak(draft: Draft, kind: str) -> None:
    key = "scheduler.params.warmup_max_lr"
    peak = draft.number(key)
    if kind == "WarmupCosineLR":
        if peak is not None:
            draft.lose(key, "WarmupCosineLR rises to the optimizer's lr")
        return
    if peak is None and kind == "WarmupDecayLR" and key not in draft.auto:
        peak = 1e-3  # its own default, whatever the optimizer's lr
        draft.defaults.append("`optimizer.lr` 0.001 (of WarmupDecayLR)")
    if peak is None:
        return
    own = draft.number("optimizer.params.lr")
    if own not in (None, peak):
        draft.lose("optimizer.params.lr", f"{kind} rises to {peak:g} whatever it is, and `optimizer.lr` is that peak")
    draft.put("optimizer.lr", peak)
