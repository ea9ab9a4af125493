"""What becomes of each key of TrainingArguments (transformers/training_args.py, 4.x and 5.x)."""

from typing import Any

from scaling.spec.foreign.draft import Origin

_HUB = "where a model is uploaded; scaling.export writes it to a folder"
_LOADING = "how samples are fetched, not which"
_LOG = "what the Trainer logs; see `profile` and `tracking`"
_EVALUATION = "of the Trainer's metrics; validation here is the loss"
_DDP = "how DDP sums, not to what"
_WRAPPING = "each block is a unit of its own here"
_WHERE = "the launcher's to say"

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
"""lr_scheduler_type to `schedule.kind`."""

_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("label_smoothing_factor", "eval_delay"), (0, 0.0)),
    **dict.fromkeys(
        (
            *("auto_find_batch_size", "group_by_length", "full_determinism", "ignore_data_skip", "use_liger_kernel"),
            *("dataloader_drop_last", "use_cpu", "no_cuda", "use_mps_device", "use_ipex", "predict_with_generate"),
            *("save_only_model", "eval_on_start", "logging_first_step", "jit_mode_eval", "batch_eval_metrics"),
            *("enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "push_to_hub", "adafactor"),
        ),
        (False,),
    ),
    "train_sampling_strategy": ("random",),
    "torch_empty_cache_steps": (None,),
    "resume_from_checkpoint": (None, False),
    "optim_args": (None, ""),
    "logging_strategy": ("steps",),
    "activation_checkpointing_kwargs": (None, {}),
    "gradient_checkpointing_kwargs": (None, {}, {"use_reentrant": False}, {"use_reentrant": True}),
    "fsdp_config.xla": (False,),
    "fsdp_config.xla_fsdp_v2": (False,),
    "fsdp_config.xla_fsdp_grad_ckpt": (False,),
    "debug": ([], ""),
    "neftune_noise_alpha": (None,),
    "parallelism_config": (None,),
    "average_tokens_across_devices": (True,),  # as the loss here: over the tokens of all ranks
}

TRAINER = Origin(
    "trainer",
    "the Trainer",
    carried={
        "per_device_train_batch_size": "batch.micro_batch_size",
        "gradient_accumulation_steps": "batch.gradient_accumulation_steps",
        "learning_rate": "optimizer.lr",
        "optim": "optimizer.kind",
        "weight_decay": "optimizer.weight_decay",
        "adam_beta1": "optimizer.betas",
        "adam_beta2": "optimizer.betas",
        "adam_epsilon": "optimizer.eps",
        "max_grad_norm": "max_grad_norm",
        "max_steps": "max_steps",
        "num_train_epochs": "epochs",
        "lr_scheduler_type": "schedule.kind",
        "lr_scheduler_kwargs": "schedule.min_lr_ratio",
        "warmup_steps": "schedule.warmup_steps",
        "warmup_ratio": "schedule.warmup_steps",
        "bf16": "precision",
        "fp16": "precision",
        "seed": "seed",
        "save_strategy": "checkpoint",
        "save_steps": "checkpoint.interval",
        "save_total_limit": "checkpoint.keep_last",
        "load_best_model_at_end": "checkpoint.best",
        "eval_strategy": "validation",
        "evaluation_strategy": "validation",
        "eval_steps": "validation.interval",
        "logging_steps": "profile.interval",
        "gradient_checkpointing": "activation_checkpointing",
        "activation_checkpointing": "activation_checkpointing",
        "torch_compile": "compile",
        "deepspeed": "backend",
        "fsdp": "backend",
        "fsdp_config.reshard_after_forward": "backend.reshard_after_forward",
        "fsdp_config.cpu_offload": "backend.cpu_offload",
        "fsdp_config.offload_params": "backend.cpu_offload",
        "fsdp_config.activation_checkpointing": "activation_checkpointing",
        "report_to": "tracking",
        "run_name": "name",
    },
    harmless={
        **dict.fromkeys(("output_dir", "overwrite_output_dir", "logging_dir"), "the run folder is named by --run-dir"),
        **dict.fromkeys(("do_train", "do_eval", "do_predict"), "what a script does besides training"),
        **dict.fromkeys(("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"), _HUB),
        **dict.fromkeys(("hub_token", "push_to_hub_token"), "no spec holds a secret"),
        **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"), _LOADING),
        **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_in_order", "accelerator_config"), _LOADING),
        **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name"), "columns of the script's data"),
        **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"), _LOG),
        **dict.fromkeys(("logging_nan_inf_filter", "include_num_input_tokens_seen", "include_tokens_per_second"), _LOG),
        **dict.fromkeys(("skip_memory_metrics", "project", "trackio_space_id"), _LOG),
        **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only"), _EVALUATION),
        **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics"), _EVALUATION),
        **dict.fromkeys(("include_inputs_for_metrics", "metric_for_best_model", "greater_is_better"), _EVALUATION),
        **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "validation has the precision of training"),
        **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters"), _DDP),
        **dict.fromkeys(("ddp_backend", "ddp_timeout", "ddp_static_graph", "local_rank"), _WHERE),
        **dict.fromkeys(("fp16_opt_level", "half_precision_backend", "fp16_backend"), "of apex, or of older versions"),
        **dict.fromkeys(
            ("use_cache", "save_safetensors", "save_on_each_node"), "checkpoints have one format, on all ranks"
        ),
        **dict.fromkeys(("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"), _WRAPPING),
        **dict.fromkeys(("fsdp_config.min_num_params", "fsdp_config.transformer_layer_cls_to_wrap"), _WRAPPING),
        **dict.fromkeys(("fsdp_config.auto_wrap_policy", "fsdp_config.version"), _WRAPPING),
        **dict.fromkeys(("fsdp_config.backward_prefetch", "fsdp_config.forward_prefetch"), "when, not what is fetched"),
        **dict.fromkeys(("fsdp_config.limit_all_gathers", "fsdp_config.use_orig_params"), "of FSDP1 alone"),
        **dict.fromkeys(
            ("fsdp_config.sync_module_states", "fsdp_config.cpu_ram_efficient_loading"), "ranks read weights"
        ),
        "fsdp_config.state_dict_type": "checkpoints have one format under every backend",
        "torch_compile_backend": "torch's inductor compiles, block by block",
        "tf32": "fp32 sums have the precision of the device's default",
        "transformers_version": "which version wrote the file",
    },
    inert=_OFF,
    lost={
        "resume_from_checkpoint": "name it on the command line (--resume)",
        "label_smoothing_factor": "the loss is plain cross-entropy",
        "logging_strategy": "records come by steps; set `profile.interval`",
        "data_seed": "one `seed` is for weights, order and dropout",
        "auto_find_batch_size": "leave `batch.micro_batch_size` out, and training finds the one that fits",
        "use_liger_kernel": "the chunked cross-entropy saves what its loss does",
        "torch_compile_mode": "blocks are compiled in torch's default mode",
    },
)
