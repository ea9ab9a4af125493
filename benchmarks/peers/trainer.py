"""Hugging Face's Trainer: under torchrun with DDP, with FSDP2, or with DeepSpeed."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.common import HUGGINGFACE, LOG_EVERY, Job, Sequences, Timeline, job_of_command_line


class Marks(TrainerCallback):  # measuring
    def __init__(self, timeline: Timeline) -> None:  # measuring
        self.timeline, self.total = timeline, 0.0  # measuring

    def heard(self, loss: Any) -> None:  # measuring
        self.total = self.total + loss.detach()  # measuring

    def on_step_end(self, *arguments: Any, **more: Any) -> None:  # measuring
        self.timeline.mark(self.total)  # measuring
        self.total = 0.0  # measuring


class Noted(Trainer):  # measuring
    marks: Marks  # measuring

    def compute_loss(self, *arguments: Any, **more: Any) -> Any:  # measuring
        loss = super().compute_loss(*arguments, **more)  # measuring
        self.marks.heard(loss)  # measuring
        return loss  # measuring


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    inputs, targets = (torch.stack([item[name] for item in items]) for name in ("inputs", "targets"))
    return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def sharding(job: Job) -> dict[str, Any]:
    if job.variant == "fsdp2":
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
    if job.variant == "zero2":
        zero = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        return {"deepspeed": {"zero_optimization": zero, "bf16": {"enabled": job.bf16}, **dict.fromkeys(auto, "auto")}}
    return {}


def main() -> None:
    job = job_of_command_line()
    marks = Marks(Timeline(job))  # measuring
    arguments = TrainingArguments(
        output_dir=str(job.out / "run"),
        use_cpu=not torch.cuda.is_available(),
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.accumulation,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        adam_beta1=job.betas[0],
        adam_beta2=job.betas[1],
        adam_epsilon=job.eps,
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=job.bf16,
        torch_compile=job.compile,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **sharding(job),
    )
    model = AutoModelForCausalLM.from_pretrained(job.folder / HUGGINGFACE)
    model.config.use_cache = False
    trainer = Noted(model=model, args=arguments, train_dataset=Sequences(job), data_collator=collate, callbacks=[marks])
    trainer.marks = marks  # measuring
    trainer.train()


if __name__ == "__main__":
    main()
