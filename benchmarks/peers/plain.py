"""A plain torch loop as one who knows torch writes it by hand: fused AdamW, DDP that waits only where it must."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.common import LOG_EVERY, Timeline, job_of_command_line, load_model, micro_batches


def main() -> None:
    job = job_of_command_line()
    timeline = Timeline(job)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    model = load_model(job).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": job.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, eps=job.eps, fused=True)
    wrapped = torch.compile(model) if job.compile else model
    if world_size > 1:
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True)
    for step, batches in enumerate(micro_batches(job, rank, world_size, device)):
        total = torch.zeros((), device=device)
        for turn, (inputs, targets) in enumerate(batches):
            waits = world_size == 1 or turn == len(batches) - 1
            with contextlib.nullcontext() if waits else wrapped.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
                    loss = wrapped(inputs, targets) / len(batches)
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0 and step % LOG_EVERY == 0:
            print(f"step {step} loss {total.item():.4f}")
        timeline.mark(total)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
