"""A loop with Lightning Fabric."""

import os

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from benchmarks.peers.common import LOG_EVERY, Sequences, Timeline, job_of_command_line, load_model


def main() -> None:
    job = job_of_command_line()
    timeline = Timeline(job)
    ranks, on_gpu = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    fabric = Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision="bf16-mixed" if job.bf16 else "32-true",
    )
    fabric.launch()
    model = load_model(job)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": job.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if job.compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, eps=job.eps, fused=True)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(Sequences(job), batch_size=job.micro_batch, pin_memory=on_gpu))
    total, step = torch.zeros((), device=fabric.device), 0
    for turn, batch in enumerate(loader, start=1):
        last = turn % job.accumulation == 0
        with fabric.no_backward_sync(model, enabled=not last):
            loss = model(batch["inputs"], batch["targets"])
            fabric.backward(loss / job.accumulation)
        total += loss.detach() / job.accumulation
        if last:
            fabric.clip_gradients(model, optimizer, max_norm=job.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                fabric.print(f"step {step} loss {total.item():.4f}")
            timeline.mark(total)
            total.zero_()
            step += 1


if __name__ == "__main__":
    main()
