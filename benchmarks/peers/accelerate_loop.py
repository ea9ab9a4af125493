"""A loop with Hugging Face's Accelerate."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from benchmarks.peers.common import LOG_EVERY, Sequences, Timeline, job_of_command_line, load_model


def main() -> None:
    job = job_of_command_line()
    timeline = Timeline(job)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=job.accumulation,
        mixed_precision="bf16" if job.bf16 else "no",
    )
    model = load_model(job)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": job.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if job.compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, eps=job.eps, fused=True)
    loader = DataLoader(Sequences(job), batch_size=job.micro_batch, pin_memory=torch.cuda.is_available())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    total, step = torch.zeros((), device=accelerator.device), 0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch["inputs"], batch["targets"])
            accelerator.backward(loss)
            total += loss.detach() / job.accumulation
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), job.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            if step % LOG_EVERY == 0:
                accelerator.print(f"step {step} loss {total.item():.4f}")
            timeline.mark(total)
            total.zero_()
            step += 1
    accelerator.end_training()


if __name__ == "__main__":
    main()
