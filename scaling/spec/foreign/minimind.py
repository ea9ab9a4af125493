"""YAML with the options of MiniMind's trainers (https://github.com/jingyaogong/minimind, trainer/train_*.py).

The sizes of its model that no option says are those of MiniMind2 (model/model_minimind.py).
"""

from typing import Any

from scaling.spec.foreign.common import PRECISIONS, put_batch, put_clip
from scaling.spec.foreign.draft import Draft, Origin, draft_of, finish, leave
from scaling.spec.foreign.values import wrong

MINIMIND = Origin(
    "minimind",
    "MiniMind",
    carried={
        "batch_size": "batch.micro_batch_size",
        "accumulation_steps": "batch.gradient_accumulation_steps",
        "hidden_size": "model.hidden_size",
        "num_hidden_layers": "model.num_hidden_layers",
        "max_seq_len": "data.sequence_length",
        "data_path": "data.train",
        "save_weight": "objective.kind",
        "learning_rate": "optimizer.lr",
        "epochs": "epochs",
        "grad_clip": "max_grad_norm",
        "dtype": "precision",
        "save_interval": "checkpoint.interval",
        "log_interval": "profile.interval",
        "use_compile": "compile",
        "seed": "seed",
        "use_wandb": "tracking.wandb",
        "wandb_project": "tracking.wandb.project",
    },
    harmless={
        "save_dir": "the run folder is named on the command line (--run-dir)",
        "out_dir": "its older name",
        "device": "a GPU where there is one",
        "num_workers": "data are read from files mapped into memory",
        "ddp": "whether there are several processes is the launcher's to say",
        "local_rank": "the launcher's to say",
    },
    inert={
        "use_moe": (0, False),
        "from_weight": ("none",),
        "from_resume": (0, False),
        "warmup_iters": (0,),
        "tokenizer_path": ("../model", "model"),
    },
    lost={
        "use_moe": "spec.json has no mixture of experts",
        "from_weight": "set `initialize_from` to a run, a checkpoint or a Hugging Face folder",
        "from_resume": "a run goes on by itself (--resume)",
        "warmup_iters": "MiniMind's schedule has no warm-up; set `schedule.warmup_steps`",
        "tokenizer_path": "set `data.tokenizer`",
    },
)
_SOURCE = "as MiniMind2's MiniMindConfig has it"
_SHAPE = {
    "vocab_size": 6400,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_KINDS = {"pretrain": ("text", "causal_lm"), "full_sft": ("chat", "sft")}
"""What the trainers call their weights, to the kinds of data and objective."""


def read_minimind(document: dict[str, Any], processes: int | None) -> tuple[dict[str, Any], list[str]]:
    """Values and notes of MiniMind's options on `processes` GPUs (None: the file does not say)."""
    draft = draft_of(MINIMIND, document)
    keys = ("batch_size", "batch_size", "accumulation_steps")  # there is no global one
    put_batch(draft, keys, (None, draft.whole("batch_size"), draft.whole("accumulation_steps")), processes)
    put_model(draft)
    put_data(draft)
    draft.move("optimizer.lr", draft.number("learning_rate"))
    optimizer = "torch's default, which MiniMind leaves as it is"
    draft.assume("optimizer.betas", [0.9, 0.999], optimizer)
    draft.assume("optimizer.weight_decay", 0.01, optimizer)
    draft.assume("schedule", {"kind": "cosine", "min_lr_ratio": 0.1}, "MiniMind's get_lr")
    draft.move("epochs", draft.number("epochs"))
    put_clip(draft, "grad_clip")
    put_rest(draft)
    draft.assume("backend.kind", "ddp", "as MiniMind's trainers under torchrun")
    leave(draft, ("precision", "max_grad_norm", "compile", "seed", "checkpoint.interval"), "the trainer")
    return finish(draft)


def put_model(draft: Draft) -> None:
    """MiniMind's own model, of which the file has width and depth."""
    width, layers = draft.whole("hidden_size"), draft.whole("num_hidden_layers")
    if width is None and layers is None:
        return
    draft.put("model.kind", "decoder")
    draft.move("model.hidden_size", width)
    draft.move("model.num_hidden_layers", layers)
    for name, value in _SHAPE.items():
        draft.assume(f"model.{name}", value, _SOURCE)
    if width is not None:
        inner = 64 * -(-(width * 8 // 3) // 64)  # MiniMind's own rounding: 8/3 of it cut off, then up to a multiple
        draft.assume("model.intermediate_size", inner, _SOURCE)


def put_data(draft: Draft) -> None:
    """The file of the trainer, with MiniMind's tokenizer."""
    weight, path = draft.text("save_weight"), draft.text("data_path")
    draft.move("data.sequence_length", draft.whole("max_seq_len"))
    if path is not None:
        draft.put("data.train", [path])
    if weight in _KINDS:
        kind, objective = _KINDS[weight]
        draft.put("data.kind", kind)
        draft.put("objective.kind", objective)
    elif weight is not None:
        draft.lose("save_weight", f"which trainer {weight} is of is not known; set `data.kind` and `objective`")
    if draft.has("data"):
        draft.assume("data.validation", 0, "MiniMind trains on all of its data")
        draft.assume("data.tokenizer", "model/tokenizer.json", "MiniMind's own, in its repository")


def put_rest(draft: Draft) -> None:
    """Precision, checkpoints, logs, tracking. MiniMind counts both intervals in micro-batches."""
    dtype = draft.text("dtype")
    if dtype is not None and dtype not in PRECISIONS:
        raise wrong("dtype", "float32, bfloat16 or float16", dtype)
    draft.move("precision", PRECISIONS[dtype] if dtype is not None else None)
    accumulation = draft.whole("accumulation_steps") or 1
    for key in ("save_interval", "log_interval"):
        value = draft.whole(key)
        if value is not None and value % accumulation == 0:
            draft.put(MINIMIND.carried[key], value // accumulation)  # exact, see the line above
        elif value is not None:
            draft.lose(
                key, f"it counts micro-batches, and {value} is no multiple of accumulation_steps ({accumulation})"
            )
    draft.move(
        "compile",
        draft.flag("use_compile") if draft.get("use_compile") not in (0, 1) else draft.get("use_compile") == 1,
    )
    draft.move("seed", draft.whole("seed"))
    if draft.flag("use_wandb"):
        draft.put("tracking.wandb", {"project": project} if (project := draft.text("wandb_project")) else {})
    elif draft.get("wandb_project") is not None and draft.get("use_wandb") is None:
        draft.lose("wandb_project", "the file does not say use_wandb; set `tracking.wandb`")
