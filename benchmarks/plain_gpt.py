"""A plain torch loop: the model, data and schedule of a GPT-2 recipe, and nothing of ours but the tokenised text.

    python -m benchmarks.plain_gpt --recipe gpt2-tiny [--seed 1]

The model is transformers', with its own initial values; samples are drawn at random. What a recipe reaches is held
against this (benchmarks/learning.py). Prints JSON: bits per byte of the recipe's own validation samples, seconds.
"""

import argparse
import json
import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from scaling.data.build import build_datasets
from scaling.data.loader import validation_batches
from scaling.spec import load_spec
from scaling.spec.sections import Cosine, Decoder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain_gpt", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="gpt2-tiny")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    spec = load_spec(options.recipe)
    shape, schedule, adam, steps = spec.model, spec.schedule, spec.optimizer, spec.max_steps
    assert isinstance(shape, Decoder) and isinstance(schedule, Cosine) and steps is not None
    assert spec.validation is not None and spec.max_grad_norm is not None and spec.batch.global_batch_tokens is not None
    train, held_out = build_datasets(spec)
    assert held_out is not None and held_out.bytes_per_token is not None
    length = spec.data.sequence_length
    batch = spec.batch.global_batch_tokens // length

    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    sizes = {"n_embd": shape.hidden_size, "n_layer": shape.num_hidden_layers, "n_head": shape.num_attention_heads}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab_size, n_positions=length, **sizes, **none))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": adam.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=adam.lr, betas=adam.betas, eps=adam.eps, fused=True)

    began = time.perf_counter()
    for step in range(steps):
        ramp = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        curve = schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * (1 + math.cos(math.pi * ramp)) / 2
        factor = (step + 1) / schedule.warmup_steps if step < schedule.warmup_steps else curve
        for group in optimizer.param_groups:
            group["lr"] = adam.lr * factor
        samples: Any = train.read(random.integers(len(train), size=batch))
        logits = model(samples.inputs).logits
        F.cross_entropy(logits.flatten(0, 1), samples.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began

    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        count = spec.validation.batches * batch
        for samples in validation_batches(held_out, samples=count, micro_batch=8, rank=0, world_size=1):
            logits = model(samples.inputs).logits
            total += float(F.cross_entropy(logits.flatten(0, 1), samples.targets.flatten(), reduction="sum"))
            tokens += samples.terms
    bits = total / tokens / math.log(2) / held_out.bytes_per_token
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"bits_per_byte": bits, "parameters": parameters, "seconds": seconds, "seed": options.seed}))


if __name__ == "__main__":
    main()
