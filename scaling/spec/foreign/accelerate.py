"""The YAML that `accelerate config` writes (accelerate/commands/config/config_args.py, cluster.py; as of 1.15)."""

from typing import Any

from scaling.spec.foreign.common import PRECISIONS, put_clip, put_fsdp, put_offload, put_zero_defaults
from scaling.spec.foreign.draft import Draft, Origin, draft_of, finish, leave
from scaling.spec.foreign.values import wrong

_ZERO, _FSDP = "deepspeed_config.", "fsdp_config."
_KINDS = {"DEEPSPEED": "deepspeed", "FSDP": "fsdp", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "NO": "single"}
_LAUNCHER = "where processes start, which is the launcher's to say"
_WRAPPING = "each block is a unit of its own here"
_LOADING = "every rank reads what it needs of the weights"

ACCELERATE = Origin(
    "accelerate",
    "accelerate",
    carried={
        "distributed_type": "backend.kind",
        "mixed_precision": "precision",
        "num_machines": "backend.replicate",
        "deepspeed_config.zero_stage": "backend.zero_stage",
        "deepspeed_config.gradient_accumulation_steps": "batch.gradient_accumulation_steps",
        "deepspeed_config.gradient_clipping": "max_grad_norm",
        "deepspeed_config.offload_optimizer_device": "backend.offload_optimizer",
        "deepspeed_config.offload_optimizer_nvme_path": "backend.nvme_path",
        "deepspeed_config.offload_param_device": "backend.offload_parameters",
        "deepspeed_config.offload_param_nvme_path": "backend.nvme_path",
        "fsdp_config.fsdp_reshard_after_forward": "backend.reshard_after_forward",
        "fsdp_config.fsdp_sharding_strategy": "backend.reshard_after_forward",
        "fsdp_config.fsdp_offload_params": "backend.cpu_offload",
        "fsdp_config.fsdp_activation_checkpointing": "activation_checkpointing",
    },
    harmless={
        "compute_environment": _LAUNCHER,
        "num_processes": "no spec says the number of processes: it is the launcher's",
        "machine_rank": _LAUNCHER,
        "gpu_ids": _LAUNCHER,
        "main_process_ip": _LAUNCHER,
        "main_process_port": _LAUNCHER,
        "rdzv_backend": _LAUNCHER,
        "same_network": _LAUNCHER,
        "main_training_function": _LAUNCHER,
        "enable_cpu_affinity": _LAUNCHER,
        "deepspeed_config.deepspeed_multinode_launcher": _LAUNCHER,
        "deepspeed_config.deepspeed_hostfile": _LAUNCHER,
        "deepspeed_config.deepspeed_inclusion_filter": _LAUNCHER,
        "deepspeed_config.deepspeed_exclusion_filter": _LAUNCHER,
        "deepspeed_config.zero3_init_flag": "how the model is built, not what it is",
        "deepspeed_config.zero3_save_16bit_model": "checkpoints are whole; see scaling.export",
        "fsdp_config.fsdp_version": "FSDP2 computes what FSDP1 does",
        "fsdp_config.fsdp_auto_wrap_policy": _WRAPPING,
        "fsdp_config.fsdp_transformer_layer_cls_to_wrap": _WRAPPING,
        "fsdp_config.fsdp_min_num_params": _WRAPPING,
        "fsdp_config.fsdp_backward_prefetch": "when parameters are fetched, not what they are",
        "fsdp_config.fsdp_forward_prefetch": "when parameters are fetched, not what they are",
        "fsdp_config.fsdp_cpu_ram_efficient_loading": _LOADING,
        "fsdp_config.fsdp_sync_module_states": _LOADING,
        "fsdp_config.fsdp_state_dict_type": "checkpoints have one format under every backend",
        "fsdp_config.fsdp_use_orig_params": "FSDP2 always keeps a module's own parameters",
    },
    inert={
        "use_cpu": (False,),
        "debug": (False,),
        "downcast_bf16": ("no", False),
        "fp8_config": ({},),
        "parallelism_config": ({},),
        "megatron_lm_config": ({},),
        "mpirun_config": ({},),
        "dynamo_config": ({},),
        "tpu_env": ([],),
        "tpu_use_cluster": (False,),
        "tpu_use_sudo": (False,),
    },
    lost={
        "deepspeed_config.deepspeed_config_file": "import that file too: all of ZeRO's settings stand there",
        "dynamo_config": "set `compile` to true for torch.compile of each block",
        "use_cpu": "the CPU is used where there is no GPU",
    },
)


def read_accelerate(document: dict[str, Any], processes: int | None) -> tuple[dict[str, Any], list[str]]:
    """Values and notes of accelerate's YAML. It has no batch, so that `processes` says nothing more."""
    del processes
    draft = draft_of(ACCELERATE, document)
    text = str(draft.get("distributed_type") or "NO").upper()
    if text not in _KINDS:
        raise wrong("distributed_type", f"one of {', '.join(_KINDS)}", draft.get("distributed_type"))
    _put_precision(draft)
    machines = draft.whole("num_machines")  # counts for hybrid sharding alone
    kind = _KINDS[text]
    if kind == "deepspeed":
        _put_zero(draft)
    elif kind == "fsdp":
        _put_fsdp(draft, machines)
    else:
        draft.put("backend.kind", kind)
    for section, used in ((_ZERO, "deepspeed"), (_FSDP, "fsdp")):
        for key in [key for key in draft.given if key.startswith(section) and kind != used]:
            draft.lose(key, f"accelerate does not look at it where distributed_type is {text}")
    script = (
        "max_grad_norm",
        "schedule",
        "optimizer.weight_decay",
        "optimizer.betas",
        "activation_checkpointing",
        "seed",
    )
    leave(draft, script, "the script")
    return finish(draft)


def _put_precision(draft: Draft) -> None:
    value = draft.get("mixed_precision")
    name = "no" if value is False else draft.text("mixed_precision")  # YAML 1.1 reads a bare no as false
    if name is not None and name not in PRECISIONS:
        draft.lose("mixed_precision", f"it is {name}, and spec.json knows bf16, fp16 and fp32")
        return
    draft.move("precision", PRECISIONS[name] if name is not None else None)
    draft.default("precision", "fp32")


def _put_zero(draft: Draft) -> None:
    stage = draft.whole(f"{_ZERO}zero_stage")
    if stage is None:
        draft.put("backend.kind", "deepspeed")
        draft.notes.append("`backend.zero_stage` must still be filled in: it stands in the file that DeepSpeed reads")
    elif not 0 <= stage <= 3:
        raise wrong(f"{_ZERO}zero_stage", "0, 1, 2 or 3", stage)
    else:
        draft.put("backend", {"kind": "deepspeed", "zero_stage": stage} if stage else {"kind": "ddp"})
    devices = (f"{_ZERO}offload_optimizer_device", f"{_ZERO}offload_param_device")
    paths = (f"{_ZERO}offload_optimizer_nvme_path", f"{_ZERO}offload_param_nvme_path")
    if stage:
        put_offload(draft, stage, devices, paths)
        put_zero_defaults(draft, stage)
    else:
        for key in [key for key in (*devices, *paths) if draft.get(key) not in (None, "none")]:
            draft.lose(key, "it takes a ZeRO stage from 1 to 3")
    draft.move("batch.gradient_accumulation_steps", draft.whole(f"{_ZERO}gradient_accumulation_steps"))
    put_clip(draft, f"{_ZERO}gradient_clipping")


def _put_fsdp(draft: Draft, machines: int | None) -> None:
    new, old = f"{_FSDP}fsdp_reshard_after_forward", f"{_FSDP}fsdp_sharding_strategy"
    if draft.get(new) is not None and draft.get(old) is not None:
        draft.lose(old, f"`{new}` stands in its place since FSDP2")
    key = new if draft.get(new) is not None else old
    value = draft.get(key)
    put_fsdp(draft, key, True if value is None else value, machines)
    if value is None:
        draft.defaults.append("`backend.reshard_after_forward` true")
    offload = draft.flag(f"{_FSDP}fsdp_offload_params")
    if draft.values["backend"]["kind"] == "fsdp":
        draft.move("backend.cpu_offload", offload)
    elif offload:
        draft.lose(f"{_FSDP}fsdp_offload_params", "ddp offloads nothing")
    checkpointing = draft.flag(f"{_FSDP}fsdp_activation_checkpointing")
    draft.move("activation_checkpointing", None if checkpointing is None else "full" if checkpointing else "none")
