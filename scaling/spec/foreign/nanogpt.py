"""Flat YAML with the names of nanoGPT's train.py (https://github.com/karpathy/nanoGPT/blob/master/train.py).

Or of the guides that follow it and count the batch in tokens (total_batch_size, as build-nanogpt's train_gpt2.py).
"""

from typing import Any

from scaling.errors import UserError
from scaling.spec.foreign.common import PRECISIONS, put_clip, put_name, ratio
from scaling.spec.foreign.draft import Draft, draft_of, finish, leave
from scaling.spec.foreign.nanogpt_keys import NANOGPT
from scaling.spec.foreign.nanogpt_model import SOURCE, put_data, put_model
from scaling.spec.foreign.values import wrong

_OWN = ("schedule", "precision", "compile", "seed", "max_grad_norm", "optimizer.betas", "optimizer.weight_decay")
"""What stays at the defaults of spec.json where the file does not say it."""


def read_nanogpt(document: dict[str, Any], processes: int | None) -> tuple[dict[str, Any], list[str]]:
    """Values and notes of nanoGPT's settings. What `processes` would say does not change its batch."""
    del processes
    draft = draft_of(NANOGPT, document)
    name = draft.text("wandb_run_name")
    if name is not None:
        put_name(draft, name, "wandb_run_name")
    put_model(draft)
    put_data(draft)
    put_batch(draft)
    put_optimizer(draft)
    put_schedule(draft)
    put_rest(draft)
    draft.assume("backend.kind", "ddp", "as nanoGPT's train.py under torchrun")
    warmup = ("schedule.warmup_steps",) if draft.find("schedule.kind") == "cosine" else ()
    leave(draft, (*_OWN, *warmup), "the script")
    return finish(draft)


def put_batch(draft: Draft) -> None:
    """Tokens a step where the file says them, else micro x accumulation, which train.py spreads over the ranks."""
    keys = ("batch_size", "gradient_accumulation_steps", "total_batch_size", "block_size")
    micro, accumulation, tokens, length = sizes = tuple(draft.whole(key) for key in keys)
    for key, value in zip(keys, sizes, strict=True):
        if value is not None and value < 1:
            raise wrong(key, "at least 1", value)
    draft.move("batch.micro_batch_size", micro)
    if tokens is not None:
        if length is not None and tokens % ((micro or 1) * length):
            raise UserError(
                f"`total_batch_size` must be a multiple of batch_size x block_size = {(micro or 1) * length}, "
                f"but is {tokens}; correct one of them"
            )
        draft.put("batch.global_batch_tokens", tokens)
        if accumulation is not None:
            draft.lose("gradient_accumulation_steps", "`batch.global_batch_tokens` and the number of ranks decide it")
    elif micro is not None and accumulation is not None:
        draft.put("batch.global_batch_size", micro * accumulation)
        draft.notes.append(
            f"`gradient_accumulation_steps` x `batch_size` becomes `batch.global_batch_size` {micro * accumulation}: "
            "train.py divides the accumulation by the number of ranks; where yours does not, multiply by that number"
        )
    else:
        draft.move("batch.gradient_accumulation_steps", accumulation)


def put_optimizer(draft: Draft) -> None:
    """AdamW, with weight decay on matrices alone."""
    draft.move("optimizer.lr", draft.number("learning_rate"))
    draft.move("optimizer.weight_decay", draft.number("weight_decay"))
    betas = [draft.number("beta1"), draft.number("beta2")]
    if betas != [None, None]:
        defaults = (0.9, 0.95)  # train.py's
        draft.put(
            "optimizer.betas",
            [default if own is None else own for own, default in zip(betas, defaults, strict=True)],
        )
    draft.assume("optimizer.decay", "matrices", SOURCE)


def put_schedule(draft: Draft) -> None:
    """Warm-up and half a cosine to min_lr, or a constant rate where decay_lr is false."""
    steps = _either(draft, "max_iters", "max_steps")
    decay_steps = draft.whole("lr_decay_iters")
    draft.move("max_steps", decay_steps if steps is None else steps)
    if steps is None and decay_steps is not None:
        draft.notes.append("`lr_decay_iters` becomes `max_steps`: that training ends with the schedule is assumed")
    elif decay_steps not in (None, steps):
        draft.lose(
            "lr_decay_iters", f"a schedule ends with the training (`max_steps` {steps}), and not at {decay_steps}"
        )
    low, peak = draft.number("min_lr"), draft.get("learning_rate")
    warmup = _either(draft, "warmup_iters", "warmup_steps")
    decay = draft.flag("decay_lr")
    if decay is False:
        draft.put("schedule", {"kind": "constant"})
        for key in [key for key in ("min_lr", "warmup_iters", "warmup_steps") if key in draft.given]:
            draft.lose(key, "train.py does not look at it where decay_lr is false")
        return
    if decay is None and low is None and warmup is None:
        return
    draft.put("schedule.kind", "cosine")
    draft.move("schedule.warmup_steps", warmup)
    if low is not None and peak is not None:
        draft.put("schedule.min_lr_ratio", ratio(draft.get("min_lr"), peak))
    elif low is None:
        draft.assume("schedule.min_lr_ratio", 0.1, "a tenth, as train.py has it")
    else:
        draft.lose("min_lr", "it is a share of `optimizer.lr` in spec.json; set `schedule.min_lr_ratio`")


def put_rest(draft: Draft) -> None:
    """Precision, clipping, validation, checkpoints, tracking."""
    dtype = draft.text("dtype")
    if dtype is not None and dtype not in PRECISIONS:
        raise wrong("dtype", "float32, bfloat16 or float16", dtype)
    draft.move("precision", PRECISIONS[dtype] if dtype is not None else None)
    put_clip(draft, "grad_clip")
    draft.move("compile", draft.flag("compile"))
    draft.move("seed", draft.whole("seed"))
    _put_validation(draft)
    draft.move("checkpoint.interval", draft.whole("save_interval"))
    always = draft.flag("always_save_checkpoint")
    if always is not None:
        draft.put("checkpoint.best", not always)
        if draft.has("validation.interval"):
            draft.assume(
                "checkpoint.interval", draft.values["validation"]["interval"], "train.py saves as it validates"
            )
    draft.move("profile.interval", draft.whole("log_interval"))
    draft.move("profile.log_gradients", draft.flag("log_gradients"))
    if draft.flag("wandb_log"):
        draft.put("tracking.wandb", {"project": project} if (project := draft.text("wandb_project")) else {})
    elif draft.get("wandb_project") is not None and draft.get("wandb_log") is None:
        draft.lose("wandb_project", "the file does not say wandb_log; set `tracking.wandb`")


def _put_validation(draft: Draft) -> None:
    draft.move("validation.interval", draft.whole("eval_interval"))
    batches, accumulation = draft.whole("eval_iters"), draft.whole("gradient_accumulation_steps")
    if batches is None:
        return
    if draft.get("total_batch_size") is None and accumulation is not None and batches % accumulation == 0:
        draft.put("validation.batches", batches // accumulation)  # exact, see the line above
    else:
        draft.lose("eval_iters", "it counts micro-batches, `validation.batches` global batches, and it is no multiple")


def _either(draft: Draft, first: str, second: str) -> int | None:
    one, other = draft.whole(first), draft.whole(second)
    if one is not None and other not in (None, one):
        raise wrong(second, f"as {first} ({one}), which means the same", other)
    return one if one is not None else other
