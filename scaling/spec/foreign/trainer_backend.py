"""The backend of TrainingArguments: DeepSpeed, FSDP, or the DDP that the Trainer uses by itself."""

from typing import Any

from scaling.spec.foreign.common import put_fsdp
from scaling.spec.foreign.deepspeed import read_deepspeed
from scaling.spec.foreign.deepspeed_keys import DEEPSPEED
from scaling.spec.foreign.draft import Draft, draft_of
from scaling.spec.foreign.values import as_list, as_section, short


def put_backend(draft: Draft, processes: int | None) -> None:
    """DeepSpeed, FSDP, or the DDP that the Trainer uses by itself."""
    deepspeed, fsdp = draft.get("deepspeed"), draft.get("fsdp")
    if (config := as_section(deepspeed)) is not None:
        _put_deepspeed(draft, config, processes)
    elif deepspeed:
        draft.put("backend.kind", "deepspeed")
        draft.lose("deepspeed", f"its settings stand in {deepspeed}; import that file too, for `backend`")
        draft.notes.append("`backend.zero_stage` must still be filled in: it stands in the file that DeepSpeed reads")
    elif fsdp:
        _put_fsdp(draft, fsdp)
    else:
        draft.put("backend.kind", "ddp")
        draft.defaults.append('`backend.kind` "ddp"')
    for key in [key for key in draft.given if key.startswith("fsdp_config.") and not fsdp]:
        draft.lose(key, "the Trainer does not look at it without `fsdp`")


def _put_fsdp(draft: Draft, fsdp: Any) -> None:
    named = fsdp.split() if isinstance(fsdp, str) else as_list(fsdp) or []
    words = [str(word).lower() for word in named]
    strategies = [word for word in words if word not in ("auto_wrap", "offload", "true")]
    option = draft.get("fsdp_config.reshard_after_forward")
    if strategies:
        put_fsdp(draft, "fsdp", strategies[0])
    else:
        put_fsdp(draft, "fsdp_config.reshard_after_forward", True if option is None else option)
    offload = "offload" in words or draft.flag("fsdp_config.cpu_offload") or draft.flag("fsdp_config.offload_params")
    if offload and draft.values["backend"]["kind"] == "fsdp":
        draft.put("backend.cpu_offload", True)


def _put_deepspeed(draft: Draft, config: dict[str, Any], processes: int | None) -> None:
    """Take the backend of an inline config, and note where the rest of it says something else."""
    values, notes = read_deepspeed(config, processes)
    draft.put("backend", values["backend"])
    theirs = values.get("schedule", {})
    if theirs and theirs["kind"] != draft.find("schedule.kind"):
        warmup = draft.find("schedule.warmup_steps") or theirs.get("warmup_steps", 0)
        draft.put("schedule", {**theirs, "warmup_steps": warmup})
        draft.notes.append(
            f"`schedule` is {theirs['kind']}: with `deepspeed.scheduler` the Trainer has no schedule of its own"
        )
    _compare(draft, draft_of(DEEPSPEED, config))
    if not config.get("gradient_clipping") and draft.find("max_grad_norm"):
        draft.notes.append(
            "`deepspeed.gradient_clipping` is not set, so DeepSpeed clips nothing: set `max_grad_norm` to null"
        )
    for note in notes:
        if "is not carried over" in note and 'it is "auto"' not in note:
            draft.notes.append(f"`deepspeed.{note.removeprefix('`')}")


def _compare(draft: Draft, told: Draft) -> None:
    """Note what an inline config of DeepSpeed says otherwise than the arguments."""
    for key, path in DEEPSPEED.carried.items():
        theirs, own = told.get(key), draft.find(path)
        if theirs is None or key.startswith(("zero_optimization.", "scheduler.type", "optimizer.type")):
            continue
        if key.endswith(".enabled"):
            own = own == key.removesuffix(".enabled")
        if theirs != own:
            draft.lose(
                f"deepspeed.{key}", f"it is {short(theirs)}; the training arguments come to {short(own)}, and stand"
            )
