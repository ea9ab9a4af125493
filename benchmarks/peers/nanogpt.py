"""nanoGPT's way: GPT-2 with query, key and value in one matrix, AdamW fused on GPUs alone, a learning rate set at each
step, gradients exchanged at the last micro-step by a flag. Its own README turns compilation off on a CPU.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.common import HUGGINGFACE, LOG_EVERY, Timeline, job_of_command_line, micro_batches


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        parts = self.attn["c_attn"](self.ln_1(hidden)).split(width, dim=2)
        query, key, value = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attn["c_proj"](mixed.transpose(1, 2).contiguous().view(batch, length, width))
        return hidden + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(hidden)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, sizes = shape["hidden_size"], (shape["num_attention_heads"], shape["intermediate_size"])
        self.wte = nn.Embedding(shape["vocab_size"], width)
        self.wpe = nn.Embedding(shape["max_position_embeddings"], width)
        self.h = nn.ModuleList(Block(width, *sizes, shape["norm_eps"]) for _ in range(shape["num_hidden_layers"]))
        self.ln_f = nn.LayerNorm(width, eps=shape["norm_eps"])
        self.lm_head = nn.Linear(width, shape["vocab_size"], bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(inputs.shape[1], device=inputs.device)
        hidden = self.wte(inputs) + self.wpe(places)
        for block in self.h:
            hidden = block(hidden)
        logits = self.lm_head(self.ln_f(hidden))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def from_pretrained(job: Any) -> GPT:
    model = GPT(job.shape)
    found = load_file(job.folder / HUGGINGFACE / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = found[f"transformer.{name}"]
            matrix = value.dim() == 2 and name.startswith("h.")  # transformers keeps those of its blocks transposed
            parameter.copy_(value.t() if matrix else value)
    return model


def main() -> None:
    job = job_of_command_line()
    timeline = Timeline(job)
    ddp = int(os.environ.get("RANK", "-1")) != -1
    rank, world_size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if ddp else (0, 1)
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}") if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if ddp:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    model: Any = from_pretrained(job).to(device)
    raw = model
    decayed = [p for p in raw.parameters() if p.dim() >= 2]
    others = [p for p in raw.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": job.weight_decay}, {"params": others, "weight_decay": 0.0}]
    more = {"fused": True} if on_gpu else {}
    optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, eps=job.eps, **more)
    if job.compile:
        model = torch.compile(model)
    if ddp:
        model = DistributedDataParallel(model)
    for step, batches in enumerate(micro_batches(job, rank, world_size, device)):
        for group in optimizer.param_groups:
            group["lr"] = job.lr
        total = torch.zeros((), device=device)
        for turn, (inputs, targets) in enumerate(batches):
            if ddp:
                model.require_backward_grad_sync = turn == job.accumulation - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
                _, loss = model(inputs, targets)
                loss = loss / job.accumulation
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0 and step % LOG_EVERY == 0:
            print(f"iter {step}: loss {total.item():.4f}")
        timeline.mark(total)
    if ddp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
