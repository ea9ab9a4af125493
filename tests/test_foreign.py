"""Configurations of others as specs: every value that is carried over, every key that is not, and what is missing."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from scaling.render import render
from scaling.spec import Spec, load_spec
from scaling.spec.foreign import ORIGINS, import_foreign, recognise
from scaling.spec.foreign.values import has

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "from-elsewhere.md"

ZERO3 = {
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "steps_per_print": 10,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/disk", "pin_memory": True, "buffer_count": 4},
        "offload_param": {"device": "nvme", "nvme_path": "/disk"},
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 2e8,
        "stage3_prefetch_bucket_size": 3e7,
        "stage3_param_persistence_threshold": 2e5,
        "stage3_max_live_parameters": 4e8,
        "stage3_max_reuse_distance": 5e8,
        "sub_group_size": 6e8,
        "zero_hpz_partition_size": 8,
        "round_robin_gradients": True,
    },
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 128},
    "gradient_clipping": 0.5,
    "optimizer": {"type": "Adam", "params": {"lr": 3e-4, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.01}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_max_lr": 2e-4, "warmup_num_steps": 200, "total_num_steps": 5000, "warmup_type": "linear"},
    },
    "curriculum_learning": {"enabled": True},
    "flops_profiler": {"enabled": False},
}
ZERO2 = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "nvme_path": "/left/over"},
        "offload_param": {"device": "none"},
        "allgather_bucket_size": 2e8,
        "sub_group_size": 1e9,
    },
    "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 10, "total_num_steps": 100, "cos_min_ratio": 0.05, "warmup_type": "linear"},
    },
}
ACCELERATE_ZERO = """
compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  deepspeed_multinode_launcher: standard
  gradient_accumulation_steps: 4
  gradient_clipping: 0.5
  offload_optimizer_device: nvme
  offload_optimizer_nvme_path: /disk
  offload_param_device: nvme
  offload_param_nvme_path: /disk
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
downcast_bf16: 'no'
fsdp_config: {}
machine_rank: 0
mixed_precision: fp16
num_machines: 1
num_processes: 8
use_cpu: false
"""
ACCELERATE_FSDP = """
distributed_type: FSDP
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_offload_params: true
  fsdp_sharding_strategy: HYBRID_SHARD_ZERO2
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 1
mixed_precision: bf16
num_machines: 2
num_processes: 16
dynamo_config: {dynamo_backend: INDUCTOR}
"""
ACCELERATE_FSDP2 = """
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false, fsdp_offload_params: false}
mixed_precision: no
"""
TRAINER = {
    "output_dir": "out",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 16,
    "learning_rate": 2e-5,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.01,
    "adam_beta1": 0.85,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-7,
    "max_grad_norm": 0.7,
    "max_steps": 1000,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 2e-6},
    "warmup_ratio": 0.0301,
    "warmup_steps": 0,
    "bf16": True,
    "fp16": False,
    "seed": 7,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 3,
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "logging_steps": 5,
    "gradient_checkpointing": True,
    "torch_compile": True,
    "report_to": ["tensorboard", "mlflow"],
    "run_name": "llama sft/1",
    "fsdp": "full_shard auto_wrap offload",
    "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "min_num_params": 0},
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": None,
}
TRAINER_EPOCHS = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "fp16": True,
    "warmup_steps": 30,
    "lr_scheduler_type": "constant_with_warmup",
    "save_strategy": "no",
    "save_steps": 100,
    "evaluation_strategy": "steps",
    "eval_steps": 50,
    "report_to": "none",
    "fsdp": True,
    "fsdp_config": {"reshard_after_forward": False, "offload_params": True, "activation_checkpointing": True},
}
TRAINER_ZERO = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "activation_checkpointing": True,
    "fsdp": "",
    "report_to": ["wandb"],
    "deepspeed": {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 2e8,
            "allgather_bucket_size": 3e8,
            "overlap_comm": True,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": "auto"}},
    },
}
TRAINER_OFFLOAD = {
    "per_device_train_batch_size": 1,
    "fsdp": True,
    "fsdp_config": {"cpu_offload": True, "version": 2},
}
NANOGPT = """
batch_size: 12
gradient_accumulation_steps: 40
block_size: 1024
n_layer: 12
n_head: 12
n_embd: 768
vocab_size: 50304
dropout: 0.1
bias: false
dataset: openwebtext
learning_rate: 6e-4
min_lr: 6e-5
warmup_iters: 2000
max_iters: 600000
weight_decay: 1e-2
beta1: 0.8
beta2: 0.99
grad_clip: 0.5
dtype: float16
compile: true
seed: 7
eval_interval: 1000
eval_iters: 200
always_save_checkpoint: true
log_interval: 20
wandb_log: true
wandb_project: owt
wandb_run_name: gpt2-124M
out_dir: out
init_from: scratch
"""
GUIDE = """
total_batch_size: 524288
batch_size: 16
block_size: 1024
n_layer: 12
learning_rate: 0.0006
warmup_steps: 715
max_steps: 19073
min_lr: 0.00012
save_interval: 5000
eval_interval: 250
log_gradients: true
hellaswag: true
"""
CONSTANT = """
batch_size: 8
block_size: 256
decay_lr: false
min_lr: 1e-5
lr_decay_iters: 500
learning_rate: 1e-3
"""
MINIMIND = """
hidden_size: 512
num_hidden_layers: 8
max_seq_len: 340
batch_size: 32
accumulation_steps: 8
learning_rate: 5e-4
epochs: 2
grad_clip: 0.5
dtype: float16
save_interval: 1000
log_interval: 80
use_wandb: true
wandb_project: MiniMind-Pretrain
use_moe: 0
use_compile: 1
seed: 42
data_path: ../dataset/pretrain_hq.jsonl
save_weight: pretrain
"""
MINIMIND_SFT = """
max_seq_len: 512
batch_size: 16
accumulation_steps: 1
learning_rate: 1e-6
epochs: 1
log_interval: 100
save_weight: full_sft
from_weight: pretrain
use_moe: 1
"""
DISK = {"device": "nvme", "nvme_path": "/disk"}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "deepspeed": [
        ZERO3,
        ZERO2,
        *({"zero_optimization": {"stage": 3, part: DISK}} for part in ("offload_optimizer", "offload_param")),
    ],
    "accelerate": [
        *(yaml.safe_load(text) for text in (ACCELERATE_ZERO, ACCELERATE_FSDP, ACCELERATE_FSDP2)),
        *(
            {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"zero_stage": 3, f"{part}_device": "nvme", f"{part}_nvme_path": "/disk"},
            }
            for part in ("offload_optimizer", "offload_param")
        ),
    ],
    "trainer": [TRAINER, TRAINER_EPOCHS, TRAINER_ZERO, TRAINER_OFFLOAD],
    "nanogpt": [yaml.safe_load(text) for text in (NANOGPT, GUIDE, CONSTANT)],
    "minimind": [yaml.safe_load(text) for text in (MINIMIND, MINIMIND_SFT)],
}


def lost(notes: list[str]) -> set[str]:
    """Keys that notes name as not carried over."""
    return {note.split("`")[1] for note in notes if note.startswith("`") and "is not carried over" in note}


def absent(notes: list[str]) -> set[str]:
    """Fields that notes name as still to be filled in."""
    return {note.split("`")[1] for note in notes if "must still be filled in" in note}


# ---------------------------------------------------------------- DeepSpeed


def test_deepspeed_zero3() -> None:
    values, notes = import_foreign(ZERO3)
    assert values == {
        "batch": {"global_batch_size": 256, "micro_batch_size": 8},
        "precision": "bf16",
        "backend": {
            "kind": "deepspeed",
            "zero_stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": 200_000_000,
            "prefetch_bucket_size": 30_000_000,
            "param_persistence_threshold": 200_000,
            "max_live_parameters": 400_000_000,
            "max_reuse_distance": 500_000_000,
            "sub_group_size": 600_000_000,
            "zero_hpz_partition_size": 8,
            "offload_optimizer": "nvme",
            "offload_parameters": "nvme",
            "nvme_path": "/disk",
        },
        "optimizer": {"kind": "adamw", "lr": 2e-4, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.01},
        "schedule": {"kind": "linear", "warmup_steps": 200},
        "max_steps": 5000,
        "max_grad_norm": 0.5,
    }
    assert lost(notes) == {
        "zero_optimization.round_robin_gradients",
        "zero_optimization.offload_optimizer.buffer_count",
        "curriculum_learning",
        "optimizer.params.lr",  # the scheduler's peak is another
    }
    assert absent(notes) == {"name", "model", "data"}
    assert any('(4) becomes "auto": the file is for 8 ranks' in note for note in notes)


def test_deepspeed_zero2() -> None:
    values, notes = import_foreign(ZERO2)
    assert values == {
        "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
        "precision": "fp16",
        "backend": {
            "kind": "deepspeed",
            "zero_stage": 2,
            "offload_optimizer": "cpu",
            "allgather_bucket_size": 200_000_000,
            "reduce_bucket_size": 500_000_000,
            "overlap_comm": False,
        },
        "optimizer": {"kind": "adamw", "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup_steps": 10, "min_lr_ratio": 0.05},
        "max_steps": 100,
        "max_grad_norm": None,
    }
    assert lost(notes) == {"zero_optimization.sub_group_size", "zero_optimization.offload_optimizer.nvme_path"}
    defaults = next(note for note in notes if note.startswith("not in the file"))
    assert "`max_grad_norm` null" in defaults and "`backend.reduce_bucket_size` 500000000" in defaults


def test_deepspeed_auto_is_left_open_and_noted() -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    }
    values, notes = import_foreign(config)
    assert values == {
        "backend": {"kind": "deepspeed", "zero_stage": 3, "overlap_comm": True},
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "constant", "warmup_steps": 1000},
    }
    assert {"train_batch_size", "bf16.enabled", "optimizer.params.lr", "gradient_clipping"} <= lost(notes)
    assert {"zero_optimization.reduce_bucket_size", "zero_optimization.stage3_prefetch_bucket_size"} <= lost(notes)
    assert {"optimizer.lr", "batch.micro_batch_size", "max_steps"} <= absent(notes)


def test_deepspeed_stage_0_is_ddp() -> None:
    values, notes = import_foreign({"train_batch_size": 8, "zero_optimization": {"stage": 0, "overlap_comm": True}})
    assert values["backend"] == {"kind": "ddp"} and lost(notes) == {"zero_optimization.overlap_comm"}
    assert import_foreign({"train_batch_size": 8})[0]["backend"] == {"kind": "ddp"}


@pytest.mark.parametrize(
    ("sizes", "processes", "batch"),
    [
        ((64, 4, 2), None, {"global_batch_size": 64, "micro_batch_size": 4}),
        ((64, 4, 2), 8, {"global_batch_size": 64, "micro_batch_size": 4}),
        ((64, 4, None), None, {"global_batch_size": 64, "micro_batch_size": 4}),
        ((64, None, 2), None, {"global_batch_size": 64, "gradient_accumulation_steps": 2}),
        ((64, None, None), None, {"global_batch_size": 64, "gradient_accumulation_steps": 1}),
        ((None, 4, 2), None, {"micro_batch_size": 4, "gradient_accumulation_steps": 2}),
        ((None, 4, 2), 8, {"global_batch_size": 64, "micro_batch_size": 4}),
        ((None, 4, None), 8, {"global_batch_size": 32, "micro_batch_size": 4}),
    ],
)
def test_batch_arithmetic(sizes: tuple[int | None, ...], processes: int | None, batch: dict[str, int]) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {name: size for name, size in zip(names, sizes, strict=True) if size is not None}
    assert import_foreign(config, "deepspeed", processes)[0]["batch"] == batch


@pytest.mark.parametrize(("whole", "processes"), [(60, None), (64, 4), (128, 8)])
def test_batch_that_does_not_multiply_is_refused(whole: int, processes: int | None) -> None:
    config = {"train_batch_size": whole, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(UserError, match=rf"`train_batch_size` must be .* but is {whole}; correct one of them"):
        import_foreign(config, None, processes)


def completed(values: dict[str, Any]) -> Spec:
    """A spec of `values`, with model and data of the smallest kind."""
    model = {
        "kind": "decoder",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    data = {"kind": "synthetic", "sequence_length": 64}
    return Spec.model_validate_json(json.dumps({"name": "there", "model": model, "data": data, **values}))


@pytest.mark.parametrize("config", [ZERO3, ZERO2])
def test_deepspeed_there_and_back(config: dict[str, Any]) -> None:
    back = render(completed(import_foreign(config, None, 8)[0]), 8)
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert back[name] == config[name]
    assert back["train_batch_size"] == config.get("train_batch_size", 64)
    zero = config["zero_optimization"]
    same = {"stage", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "zero_hpz_partition_size"}
    for name in {name for name in zero if name in same or name.startswith("stage3_")} & set(back["zero_optimization"]):
        assert back["zero_optimization"][name] == zero[name], name
    assert back["zero_optimization"]["offload_optimizer"]["device"] == zero["offload_optimizer"]["device"]
    assert back["gradient_clipping"] == config.get("gradient_clipping", 0.0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_our_own_rendered_config_comes_back_whole(stage: int) -> None:
    spec = load_spec("gpt2-124m", ["backend.kind=deepspeed", f"backend.zero_stage={stage}"])
    config = render(spec, 8)
    values, notes = import_foreign(config)
    assert lost(notes) == set()
    assert values["batch"]["global_batch_size"] == 512
    assert render(spec.model_copy(update={"backend": completed({**values, **LENGTH}).backend}), 8) == config


LENGTH = {"optimizer": {"lr": 1e-3}, "max_steps": 10}


# ---------------------------------------------------------------- accelerate


def test_accelerate() -> None:
    zero, fsdp, fsdp2 = (import_foreign(document) for document in EXAMPLES["accelerate"][:3])
    assert zero[0] == {
        "precision": "fp16",
        "backend": {
            "kind": "deepspeed",
            "zero_stage": 3,
            "offload_optimizer": "nvme",
            "offload_parameters": "nvme",
            "nvme_path": "/disk",
            "reduce_bucket_size": 500_000_000,
            "overlap_comm": True,
        },
        "batch": {"gradient_accumulation_steps": 4},
        "max_grad_norm": 0.5,
    }
    assert lost(zero[1]) == set()
    needed = {"name", "model", "data", "optimizer.lr", "batch.micro_batch_size", "max_steps"}
    assert absent(zero[1]) == needed
    assert fsdp[0] == {
        "precision": "bf16",
        "backend": {"kind": "fsdp", "reshard_after_forward": False, "replicate": 2, "cpu_offload": True},
        "activation_checkpointing": "full",
    }
    assert lost(fsdp[1]) == {"dynamo_config"}
    assert fsdp2[0] == {
        "precision": "fp32",
        "backend": {"kind": "fsdp", "reshard_after_forward": False, "cpu_offload": False},
    }


@pytest.mark.parametrize(("kind", "backend"), [("MULTI_GPU", "ddp"), ("NO", "single")])
def test_accelerate_without_sharding(kind: str, backend: str) -> None:
    document = {"distributed_type": kind, "fsdp_config": {"fsdp_offload_params": True}}
    values, notes = import_foreign(document)
    assert values["backend"] == {"kind": backend} and lost(notes) == {"fsdp_config.fsdp_offload_params"}


def test_accelerate_names_the_file_that_has_the_rest() -> None:
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    values, notes = import_foreign(config)
    assert values["backend"] == {"kind": "deepspeed"}
    assert "backend.zero_stage" in absent(notes) and lost(notes) == {"deepspeed_config.deepspeed_config_file"}


@pytest.mark.parametrize(
    ("strategy", "backend"),
    [
        ("FULL_SHARD", {"kind": "fsdp", "reshard_after_forward": True}),
        (2, {"kind": "fsdp", "reshard_after_forward": False}),
        ("NO_SHARD", {"kind": "ddp"}),
    ],
)
def test_accelerate_sharding_strategies(strategy: Any, backend: dict[str, Any]) -> None:
    document = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": strategy}}
    assert import_foreign(document)[0]["backend"] == backend


# ---------------------------------------------------------------- TrainingArguments


def test_trainer_by_steps() -> None:
    values, notes = import_foreign(TRAINER)
    assert values == {
        "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 16},
        "optimizer": {
            "kind": "adamw",
            "lr": 2e-5,
            "eps": 1e-7,
            "weight_decay": 0.01,
            "betas": [0.85, 0.98],
            "decay": "matrices",
        },
        "max_grad_norm": 0.7,
        "seed": 7,
        "max_steps": 1000,
        "schedule": {"kind": "cosine", "min_lr_ratio": 0.1, "warmup_steps": 31},  # ceil(30.1), as the Trainer
        "precision": "bf16",
        "activation_checkpointing": "full",
        "compile": True,
        "checkpoint": {"interval": 200, "keep_last": 3, "best": True},
        "profile": {"interval": 5},
        "validation": {"interval": 100},
        "name": "llama-sft-1",
        "tracking": {"tensorboard": True},
        "backend": {"kind": "fsdp", "reshard_after_forward": True, "cpu_offload": True},
    }
    assert lost(notes) == {"label_smoothing_factor", "report_to"}
    assert absent(notes) == {"model", "data", "validation.batches"}
    assert import_foreign(TRAINER, None, 8)[0]["batch"] == {"global_batch_size": 512, "micro_batch_size": 4}


def test_trainer_by_epochs() -> None:
    values, notes = import_foreign(TRAINER_EPOCHS)
    assert values["epochs"] == 2 and "max_steps" not in values
    assert values["batch"] == {"micro_batch_size": 2, "gradient_accumulation_steps": 1}
    assert values["optimizer"] == {
        "lr": 5e-5,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decay": "matrices",
    }
    assert values["schedule"] == {"kind": "constant", "warmup_steps": 30}
    assert (values["precision"], values["checkpoint"], values["seed"]) == ("fp16", None, 42)
    assert values["backend"] == {"kind": "fsdp", "reshard_after_forward": False, "cpu_offload": True}
    assert values["activation_checkpointing"] == "full" and values["tracking"] == {"tensorboard": False}
    assert values["validation"] == {"interval": 50} and lost(notes) == {"save_steps"}


def test_trainer_warmup_ratio_needs_the_length() -> None:
    values, notes = import_foreign({"per_device_train_batch_size": 1, "num_train_epochs": 1, "warmup_ratio": 0.1})
    assert values["schedule"] == {"kind": "linear"} and lost(notes) == {"warmup_ratio"}


def test_trainer_with_deepspeed_inside() -> None:
    values, notes = import_foreign(TRAINER_ZERO, None, 8)
    assert values["backend"] == {
        "kind": "deepspeed",
        "zero_stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 200_000_000,
        "allgather_bucket_size": 300_000_000,
    }
    assert values["optimizer"]["lr"] == 1e-4 and values["max_grad_norm"] == 1.0
    assert values["batch"] == {"global_batch_size": 32, "micro_batch_size": 4}
    assert values["tracking"]["wandb"] == {"project": "huggingface"}
    assert lost(notes) == {"deepspeed.optimizer.params.lr"}


def test_trainer_with_deepspeeds_scheduler_and_without_clipping() -> None:
    arguments = copy.deepcopy(TRAINER_ZERO)
    del arguments["deepspeed"]["gradient_clipping"], arguments["deepspeed"]["optimizer"]
    arguments["deepspeed"]["scheduler"] = {"type": "WarmupLR", "params": {"warmup_type": "linear"}}
    values, notes = import_foreign(arguments)
    assert values["schedule"] == {"kind": "constant", "warmup_steps": 1000}
    assert any("DeepSpeed clips nothing" in note for note in notes)


def test_trainer_with_deepspeed_in_a_file() -> None:
    values, notes = import_foreign({"per_device_train_batch_size": 1, "deepspeed": "ds.json"})
    assert values["backend"] == {"kind": "deepspeed"} and "backend.zero_stage" in absent(notes)


# ---------------------------------------------------------------- nanoGPT, MiniMind


def test_nanogpt_is_complete() -> None:
    values, notes = import_foreign(EXAMPLES["nanogpt"][0])
    assert values == {
        "name": "gpt2-124M",
        "model": {
            "kind": "decoder",
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_size": 768,
            "vocab_size": 50304,
            "max_position_embeddings": 1024,
            "dropout": 0.1,
            "bias": False,
            "intermediate_size": 3072,
            "norm": "layernorm",
            "activation": "gelu",
            "position": "learned",
            "tie_word_embeddings": True,
        },
        "data": {
            "kind": "tokens",
            "sequence_length": 1024,
            "train": ["data/openwebtext/train.bin"],
            "validation": ["data/openwebtext/val.bin"],
        },
        "batch": {"micro_batch_size": 12, "global_batch_size": 480},
        "optimizer": {"lr": 6e-4, "weight_decay": 0.01, "betas": [0.8, 0.99], "decay": "matrices"},
        "max_steps": 600_000,
        "schedule": {"kind": "cosine", "warmup_steps": 2000, "min_lr_ratio": 0.1},
        "precision": "fp16",
        "max_grad_norm": 0.5,
        "compile": True,
        "seed": 7,
        "validation": {"interval": 1000, "batches": 5},
        "checkpoint": {"best": False, "interval": 1000},
        "profile": {"interval": 20},
        "tracking": {"wandb": {"project": "owt"}},
        "backend": {"kind": "ddp"},
    }
    assert lost(notes) == absent(notes) == set()
    Spec.model_validate_json(json.dumps(values))


def test_nanogpt_guide_in_tokens() -> None:
    values, notes = import_foreign(EXAMPLES["nanogpt"][1])
    assert values["batch"] == {"global_batch_tokens": 524_288, "micro_batch_size": 16}
    assert values["schedule"] == {"kind": "cosine", "warmup_steps": 715, "min_lr_ratio": 0.2}
    assert values["profile"] == {"log_gradients": True}
    assert (values["max_steps"], values["checkpoint"]["interval"]) == (19_073, 5000)
    assert lost(notes) == {"hellaswag"}
    sizes = {f"model.{name}" for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    assert absent(notes) == {"name", "data.train", "validation.batches", *sizes}
    with pytest.raises(UserError, match="`total_batch_size` must be a multiple of batch_size x block_size = 16384"):
        import_foreign({"total_batch_size": 500_000, "batch_size": 16, "block_size": 1024})


def test_nanogpt_constant() -> None:
    values, notes = import_foreign(EXAMPLES["nanogpt"][2])
    assert values["schedule"] == {"kind": "constant"} and values["max_steps"] == 500
    assert lost(notes) == {"min_lr"}


def test_minimind_is_complete() -> None:
    values, notes = import_foreign(EXAMPLES["minimind"][0])
    recipe = json.loads((ROOT / "scaling" / "recipes" / "minimind-pretrain.json").read_text())
    assert values["model"] == {**recipe["model"], "norm_eps": 1e-5}
    assert values["data"] == {
        "kind": "text",
        "train": ["../dataset/pretrain_hq.jsonl"],
        "sequence_length": 340,
        "validation": 0,
        "tokenizer": "model/tokenizer.json",
    }
    assert values["batch"] == {"micro_batch_size": 32, "gradient_accumulation_steps": 8}
    assert values["optimizer"] == {"lr": 5e-4, "betas": [0.9, 0.999], "weight_decay": 0.01}
    assert values["schedule"] == {"kind": "cosine", "min_lr_ratio": 0.1}
    assert (values["epochs"], values["max_grad_norm"], values["precision"]) == (2, 0.5, "fp16")
    assert (values["checkpoint"], values["profile"]) == ({"interval": 125}, {"interval": 10})
    assert (values["compile"], values["seed"], values["backend"]) == (True, 42, {"kind": "ddp"})
    assert values["tracking"] == {"wandb": {"project": "MiniMind-Pretrain"}}
    assert lost(notes) == set() and absent(notes) == {"name"}
    Spec.model_validate_json(json.dumps({"name": "m", **values}))
    assert import_foreign(EXAMPLES["minimind"][0], None, 4)[0]["batch"] == {
        "global_batch_size": 1024,
        "micro_batch_size": 32,
    }


def test_minimind_sft() -> None:
    values, notes = import_foreign(EXAMPLES["minimind"][1])
    assert (values["data"]["kind"], values["objective"]) == ("chat", {"kind": "sft"})
    assert values["optimizer"]["lr"] == 1e-6 and values["batch"]["gradient_accumulation_steps"] == 1
    assert lost(notes) == {"use_moe", "from_weight"} and absent(notes) == {"name", "model", "data.train"}


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ORIGINS)
def test_recognised_by_content(name: str) -> None:
    assert all(recognise(example) == name for example in EXAMPLES[name])
    assert recognise({"model_type": "gpt2", "n_layer": 12}) is None


def without(document: dict[str, Any], key: str) -> dict[str, Any] | None:
    """`document` without a dotted key, None where it does not have it."""
    changed = copy.deepcopy(document)
    *sections, last = key.split(".")
    node: Any = changed
    for section in sections:
        node = node.get(section, {})
    return None if node.pop(last, None) is None else changed


def at(values: dict[str, Any], path: str) -> Any:
    """The value at a dotted path, and whether there is one."""
    if not has(values, path):
        return None, False
    node: Any = values
    for part in path.split("."):
        node = node[part]
    return node, True


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in ORIGINS for key in ORIGINS[name].carried])
def test_each_carried_key_decides_its_field(name: str, key: str) -> None:
    path = ORIGINS[name].carried[key]
    changes = 0
    for example in EXAMPLES[name]:
        changed = without(example, key)
        if changed is not None:
            changes += at(import_foreign(example, name)[0], path) != at(import_foreign(changed, name)[0], path)
    assert changes, f"without `{key}` in an example `{path}` must be another, but is the same"


@pytest.mark.parametrize("name", ORIGINS)
def test_no_key_is_passed_over(name: str) -> None:
    origin = ORIGINS[name]
    tables = [*origin.carried, *origin.harmless, *origin.inert]
    assert not set(origin.carried) & {*origin.harmless, *origin.inert, *origin.lost}
    assert not set(origin.harmless) & {*origin.inert, *origin.lost}
    assert all(reason for reason in origin.harmless.values())
    _, notes = import_foreign({**EXAMPLES[name][0], "never_heard_of": 1, "nor_of": {"this": [1]}}, name)
    assert {"never_heard_of", "nor_of"} <= lost(notes)
    assert len(tables) == len(set(tables))


def test_carried_fields_are_fields_of_the_spec() -> None:
    from scaling.spec import spec_schema
    from scaling.spec.schema import child

    for origin in ORIGINS.values():
        for path in origin.carried.values():
            shape = spec_schema()
            for part in path.split("."):
                shape = child(shape, part, None)
                assert shape, (origin.name, path)


def test_the_page_says_what_the_code_does() -> None:
    for name, origin in ORIGINS.items():
        section = PAGE.read_text().partition(f"(`--format {name}`)")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", section, re.MULTILINE)
        assert dict(rows) == dict(origin.carried) and len(rows) == len(origin.carried), name
        harmless = section.partition("Nothing is lost without:")[2]
        assert set(re.findall(r"`([^`]+)`", harmless)) == set(origin.harmless), name


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"train_batch_size": "many"}, '`train_batch_size` must be a finite number, but is "many"; correct it'),
        ({"train_batch_size": 2.5}, "`train_batch_size` must be a whole number, but is 2.5; correct it"),
        ({"train_batch_size": 0}, "`train_batch_size` must be at least 1, but is 0; correct it"),
        ({"zero_optimization": 3}, "`zero_optimization` must be a section with keys of its own, but is 3; correct it"),
        ({"zero_optimization": {"stage": 4}}, "`zero_optimization.stage` must be 0, 1, 2 or 3, but is 4; correct it"),
        ({"distributed_type": "TPU"}, "`distributed_type` must be one of DEEPSPEED, FSDP, MULTI_GPU,"),
        ({"block_size": 8, "dtype": "int8"}, '`dtype` must be float32, bfloat16 or float16, but is "int8"'),
        ({"max_iters": 5, "max_steps": 6}, "`max_steps` must be as max_iters (5), which means the same, but is 6"),
        ({"optimizer": {}}, "the configuration must be of deepspeed, accelerate, trainer, nanogpt, minimind, but has"),
    ],
)
def test_mistakes(document: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        import_foreign(document)
    assert str(error.value).startswith(message)


STRANGE = (None, "auto", -1, 0, 2.5, float("inf"), "strange", True, [], {}, [1], {"enabled": False}, {"a": {"b": 1}})


@pytest.mark.parametrize("name", ORIGINS)
def test_strange_values_are_refused_or_noted(name: str) -> None:
    """Each key at each strange value: a UserError, or values that are JSON."""
    refused = 0
    for example in EXAMPLES[name]:
        for key in [key for key in ORIGINS[name].carried if without(example, key) is not None]:
            for strange in STRANGE:
                document = copy.deepcopy(example)
                *sections, last = key.split(".")
                node: Any = document
                for section in sections:
                    node = node[section]
                node[last] = strange
                try:
                    values, _ = import_foreign(document, name)
                    json.dumps(values, allow_nan=False)
                except UserError as error:
                    assert re.search("must be .*, but is .*; correct", str(error)), error
                    refused += 1
    assert refused


# ---------------------------------------------------------------- the command


def command(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; {code}\nfrom scaling.errors import run_command\nfrom scaling.spec.__main__ import main\n"
    program += "code = run_command(main)\n"
    program += "assert not {'torch', 'numpy', 'deepspeed', 'rich'} & set(sys.modules)\nsys.exit(code)"
    return subprocess.run(
        [sys.executable, "-c", program, "import", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_command_with_a_complete_spec(tmp_path: Path) -> None:
    (tmp_path / "nano.yaml").write_text(NANOGPT)
    done = command(str(tmp_path / "nano.yaml"), "--out", str(tmp_path / "spec.json"))
    assert (done.returncode, done.stdout) == (0, "")
    assert '`optimizer.decay` is assumed to be "matrices"' in done.stderr
    assert load_spec(str(tmp_path / "spec.json")).batch.global_batch_size == 480


def test_command_with_a_partial_spec(tmp_path: Path) -> None:
    (tmp_path / "my zero.json").write_text(json.dumps(ZERO3))
    done = command(str(tmp_path / "my zero.json"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    printed = json.loads(done.stdout)
    assert printed["name"] == "my-zero" and "model" not in printed
    lines = done.stderr.splitlines()
    assert "`name` is a placeholder, my-zero: change it to what the run is to be called" in lines
    assert absent(lines) == {"model", "data"} and not any("must be set" in line for line in lines)


def test_command_says_what_the_spec_refuses(tmp_path: Path) -> None:
    (tmp_path / "nano.yaml").write_text(NANOGPT.replace("n_head: 12", "n_head: 7"))
    done = command(str(tmp_path / "nano.yaml"))
    assert done.returncode == 2 and "`model.hidden_size` must be a multiple of num_attention_heads (7)" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.json", None, "must be a JSON or YAML file, but is no file; name a configuration"),
        ("a.json", '{"a": 1', "must be valid JSON, but is not (line 1: "),
        ("a.yaml", "a: [1", "must be JSON or YAML, but is neither (line 1: "),
        ("a.yaml", "", "must be an object of keys and values, but is empty; name a configuration"),
        ("a.yaml", "- 1", "must be an object of keys and values, but is a list; name a configuration"),
        ("a.json", '{"a": 1}', "the configuration must be of deepspeed, accelerate, trainer, nanogpt, minimind"),
    ],
)
def test_command_with_a_wrong_file(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    done = command(str(tmp_path / name))
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_command_without_pyyaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(NANOGPT)
    (tmp_path / "a.json").write_text(json.dumps(ZERO3))
    done = command(str(tmp_path / "a.yaml"), code="sys.modules['yaml'] = None")
    assert done.returncode == 2 and done.stderr.endswith("but is YAML; pip install pyyaml\n")
    assert json.loads(command(str(tmp_path / "a.json"), code="sys.modules['yaml'] = None").stdout)


def test_command_takes_format_and_processes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"batch_size": 4, "learning_rate": 1e-3}))
    assert command(str(tmp_path / "a.json")).returncode == 2
    done = command(str(tmp_path / "a.json"), "--format", "minimind", "--num-processes", "8")
    assert json.loads(done.stdout)["batch"] == {"micro_batch_size": 4}
