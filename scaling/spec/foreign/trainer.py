"""TrainingArguments of Hugging Face's transformers as JSON, `to_json_string()` or a script's own file (as of 5.24)."""

import math
from typing import Any

from scaling.spec.foreign.common import put_batch, put_clip, put_name, ratio
from scaling.spec.foreign.draft import Draft, draft_of, finish
from scaling.spec.foreign.trainer_backend import put_backend
from scaling.spec.foreign.trainer_keys import SCHEDULES, TRAINER
from scaling.spec.foreign.values import as_list, as_number, as_section, short, wrong

_BATCH = ("train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")


def read_trainer(document: dict[str, Any], processes: int | None) -> tuple[dict[str, Any], list[str]]:
    """Values and notes of TrainingArguments on `processes` devices (None: the file does not say)."""
    options = as_section(document.get("fsdp_config"))
    if options is not None:  # its keys may have the prefix fsdp_, which TrainingArguments takes off as well
        document = {**document, "fsdp_config": {key.removeprefix("fsdp_"): value for key, value in options.items()}}
    draft = draft_of(TRAINER, document)
    put_batch(draft, _BATCH, (None, _or(draft, _BATCH[1], 8), _or(draft, _BATCH[2], 1)), processes)
    put_optimizer(draft)
    put_length(draft)
    put_schedule(draft)
    put_precision(draft)
    put_saving(draft)
    put_tracking(draft)
    put_backend(draft, processes)
    return finish(draft)


def _or(draft: Draft, key: str, default: int) -> int:
    value = draft.whole(key)
    if value is None:
        draft.defaults.append(f"`{TRAINER.carried[key]}` {default}")
    return default if value is None else value


def put_optimizer(draft: Draft) -> None:
    """AdamW in any of torch's forms."""
    kind = draft.text("optim")
    if (
        kind is not None and not kind.startswith(("adamw_torch", "adamw_hf", "adamw_apex_fused"))
    ) or kind == "adamw_torch_8bit":
        draft.lose("optim", f"it is {kind}, and spec.json knows torch's AdamW alone, which stands in its place")
    draft.move("optimizer.kind", None if kind is None else "adamw")
    draft.move("optimizer.lr", draft.number("learning_rate"))
    draft.move("optimizer.eps", draft.number("adam_epsilon"))
    draft.move("optimizer.weight_decay", draft.number("weight_decay"))
    betas = [draft.number("adam_beta1"), draft.number("adam_beta2")]
    if betas != [None, None]:
        draft.put("optimizer.betas", [0.9 if betas[0] is None else betas[0], 0.999 if betas[1] is None else betas[1]])
    for name, value in (("lr", 5e-5), ("betas", [0.9, 0.999]), ("eps", 1e-8), ("weight_decay", 0.0)):
        draft.default(f"optimizer.{name}", value)
    draft.put("optimizer.decay", "matrices")
    draft.notes.append(
        "`optimizer.decay` is matrices: the Trainer decays no norms and biases (get_decay_parameter_names)"
    )
    put_clip(draft, "max_grad_norm")
    draft.default("max_grad_norm", 1.0)
    draft.move("seed", draft.whole("seed"))
    draft.default("seed", 42)


def put_length(draft: Draft) -> None:
    """max_steps where it is positive, else epochs."""
    steps, epochs = draft.whole("max_steps"), draft.number("num_train_epochs")
    if steps is not None and steps > 0:
        draft.put("max_steps", steps)
        if epochs not in (None, 3.0):
            draft.lose("num_train_epochs", "max_steps stands in its place, as in the Trainer")
    else:
        draft.move("epochs", epochs)
        draft.default("epochs", 3.0)


def put_schedule(draft: Draft) -> None:
    """The schedule with its warm-up; only `constant` has none."""
    name = (draft.text("lr_scheduler_type") or "linear").lower()
    options = draft.get("lr_scheduler_kwargs")
    section = as_section(options)
    if section is None and options not in (None, ""):
        raise wrong("lr_scheduler_kwargs", "a section with keys of its own", options)
    left = dict(section or {})
    if name not in SCHEDULES:
        draft.lose("lr_scheduler_type", f"it is {name}, and spec.json has another set of schedules; set `schedule`")
        return
    draft.put("schedule", {"kind": SCHEDULES[name]})
    if draft.get("lr_scheduler_type") is None:
        draft.defaults.append('`schedule.kind` "linear"')
    if name == "cosine_with_restarts":
        draft.put("schedule.cycles", as_number("lr_scheduler_kwargs.num_cycles", left.pop("num_cycles", 1)))
    elif name == "warmup_stable_decay":
        for key, path in (("min_lr_ratio", "schedule.min_lr_ratio"), ("num_decay_steps", "schedule.decay_steps")):
            draft.move(path, as_number(f"lr_scheduler_kwargs.{key}", left.pop(key, None)))
        if left.get("decay_type", "cosine") != "linear":
            draft.notes.append("`lr_scheduler_kwargs.decay_type` is not carried over: the descent of `wsd` is straight")
        left.pop("decay_type", None)
    elif name in ("cosine_with_min_lr", "cosine"):
        low, share = (as_number(f"lr_scheduler_kwargs.{key}", left.pop(key, None)) for key in ("min_lr", "min_lr_rate"))
        share = share if low is None else ratio(low, draft.values["optimizer"]["lr"])
        draft.put("schedule.min_lr_ratio", share if share is not None else 0.0)
    for key, value in left.items():
        draft.lose(
            f"lr_scheduler_kwargs.{key}", f"it is {short(value)}, and `schedule` of kind {SCHEDULES[name]} has none"
        )
    _put_warmup(draft, name)


def _put_warmup(draft: Draft, name: str) -> None:
    steps, share = draft.number("warmup_steps") or 0, draft.number("warmup_ratio") or 0
    key = "warmup_steps" if steps else "warmup_ratio"
    if not steps and not share:
        return
    if name == "constant":
        draft.lose(key, "the Trainer does not look at it where lr_scheduler_type is constant")
    elif steps >= 1:
        draft.put("schedule.warmup_steps", int(steps))  # as get_warmup_steps, which cuts off a fraction
    elif draft.has("max_steps"):
        draft.put("schedule.warmup_steps", math.ceil(draft.values["max_steps"] * (steps or share)))
    else:
        draft.lose(key, "the number of steps depends on the data; set `schedule.warmup_steps` to this share of them")


def put_precision(draft: Draft) -> None:
    """Precision, recomputation, compilation."""
    names = [name for name in ("bf16", "fp16") if draft.flag(name)]
    if len(names) == 2:
        raise wrong("fp16", "false where bf16 is true", True)
    draft.move("precision", names[0] if names else None)
    draft.default("precision", "fp32")
    flags = [draft.flag(key) for key in ("activation_checkpointing", "gradient_checkpointing")]
    flags.append(draft.flag("fsdp_config.activation_checkpointing"))
    draft.put("activation_checkpointing", "full" if any(flags) else "none")
    draft.put("compile", draft.flag("torch_compile") or False)


def put_saving(draft: Draft) -> None:
    """Checkpoints and validations by steps; other ways to count them are noted."""
    strategy = (draft.text("save_strategy") or "steps").lower()
    if strategy == "no":
        draft.put("checkpoint", None)
    else:
        if strategy == "epoch":
            draft.lose("save_strategy", "checkpoints come by steps; set `checkpoint.interval`")
        else:
            _put_interval(draft, "save_steps")
            _put_default(draft, "save_steps", 500)
        draft.move("checkpoint.keep_last", draft.whole("save_total_limit") or None)
        draft.default("checkpoint.keep_last", None)
        draft.put("checkpoint.best", (draft.flag("load_best_model_at_end") or False) or strategy == "best")
    _put_interval(draft, "logging_steps")
    _put_default(draft, "logging_steps", 500)
    evaluation = (draft.text("eval_strategy") or draft.text("evaluation_strategy") or "no").lower()
    if evaluation == "steps":
        key = "eval_steps" if "eval_steps" in draft.given else "logging_steps"  # which stands in for it
        _put_interval(draft, key, "validation.interval")
        draft.notes.append(
            "the Trainer validates on the whole set: `validation.batches` global batches are yours to say"
        )
    elif evaluation == "epoch":
        draft.lose("eval_strategy", "validations come by steps; set `validation`")
    elif "eval_steps" in draft.given:
        draft.lose("eval_steps", "eval_strategy is not steps, so the Trainer does not validate; set `validation`")


def _put_interval(draft: Draft, key: str, path: str | None = None) -> None:
    value = draft.number(key)
    path = path or TRAINER.carried[key]
    if value is None:
        return
    if value >= 1:
        draft.put(path, draft.whole(key))
    elif draft.has("max_steps"):
        draft.put(path, math.ceil(draft.values["max_steps"] * value))  # as TrainerState.compute_steps
    else:
        draft.lose(key, f"it is a share of a length that depends on the data; set `{path}`")


def _put_default(draft: Draft, key: str, value: int) -> None:
    if key not in draft.given:
        draft.default(TRAINER.carried[key], value)


def put_tracking(draft: Draft) -> None:
    """The name, and where metrics go."""
    if (name := draft.text("run_name")) is not None:
        put_name(draft, name, "run_name")
    value = draft.get("report_to")
    names = [value] if isinstance(value, str) else as_list(value) or []
    known = {"tensorboard", "wandb", "none", "all"}
    if value is not None:
        draft.put("tracking.tensorboard", bool({"tensorboard", "all"}.intersection(names)))
    draft.default("tracking.tensorboard", False)
    if {"wandb", "all"}.intersection(names):
        draft.assume("tracking.wandb.project", "huggingface", "the Trainer's own where WANDB_PROJECT is not set")
    for name in names:
        if name not in known:
            draft.lose("report_to", f"it has {name}, and `tracking` has tensorboard, wandb and prometheus")
