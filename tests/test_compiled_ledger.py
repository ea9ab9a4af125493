"""What the ledger says that a compiled block keeps, against torch's own partitioner."""

from unittest.mock import patch

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from scaling.engine.blocks import prepare_blocks
from scaling.estimate.step import play
from scaling.groups import resolve_groups
from scaling.inventory import parameters
from scaling.models.decoder import Block, rotation_of
from scaling.records import BatchPlan
from scaling.render import render
from scaling.spec.sections import Spec

LENGTH = 64


def spec_of(activation: str, checkpointing: str, layers: int) -> Spec:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    document = {
        "name": "compiled",
        "model": {"kind": "decoder", "vocab_size": 4096, "activation": activation, **sizes, **heads},
        "objective": {"kind": "causal_lm", "cross_entropy": "plain"},
        "data": {"kind": "synthetic", "sequence_length": LENGTH},
        "batch": {"micro_batch_size": 1, "gradient_accumulation_steps": 1},
        "optimizer": {"lr": 1e-3},
        "backend": {"kind": "fsdp"},
        "compile": True,
        "activation_checkpointing": checkpointing,
        "max_steps": 1,
    }
    return Spec.model_validate(document)


def played(activation: str, checkpointing: str) -> float:
    """Bytes a token that one block more keeps until the loss, where the peak is."""
    found: dict[tuple[int, int], int] = {}
    for layers in (3, 4):
        spec = spec_of(activation, checkpointing, layers)
        groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
        for micro in (8, 16):
            plan = BatchPlan(2 * micro, micro, 1, 2, LENGTH)
            found[layers, micro] = play(spec, plan, groups, render(spec, 2), cuda=True).peak.parts["activations"]
    more = {micro: found[4, micro] - found[3, micro] for micro in (8, 16)}
    return (more[16] - more[8]) / (8 * LENGTH)


def partitioned(activation: str, checkpointing: str) -> float:
    """Bytes a token that the compiled forward pass of a block hands to its backward pass, parameters apart."""
    spec = spec_of(activation, checkpointing, 1)
    block = Block(spec.model).to(torch.bfloat16)
    names = {tuple(parameter.shape) for parameter in block.parameters()}
    rotation = rotation_of(spec.model, torch.arange(LENGTH), torch.bfloat16)
    names.add(tuple(rotation[0].shape))
    kept: list[float] = []

    def partition(joint: fx.GraphModule, inputs: object, **options: object) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)
        (output,) = (node for node in forward.graph.nodes if node.op == "output")
        for node in output.args[0][1:]:  # the first is the block's result
            value = node.meta["val"]
            given = node.op == "placeholder" and tuple(value.shape) in names
            # Attention's result comes twice, as it is and as the projection after it reads it: one memory.
            if not given and node.target is not torch.ops.aten.alias.default:
                kept.append(value.numel() * value.element_size() / (2 * LENGTH))
        return forward, backward

    def plain(module: fx.GraphModule, _: object) -> object:
        return make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=plain, bw_compiler=plain, partition_fn=partition, decompositions=select_decomp_table()
    )
    compiler = torch.compile
    with patch("torch.compile", lambda function, **_: compiler(function, backend=backend, dynamic=False)):
        prepare_blocks(nn.ModuleList([block]), ["0"], checkpointing=checkpointing, compiled=True)
    torch._dynamo.reset()
    hidden = torch.randn(2, LENGTH, 64, dtype=torch.bfloat16, requires_grad=True)
    block(hidden, rotation)
    return sum(kept)


@pytest.mark.parametrize(
    ("activation", "checkpointing"), [("swiglu", "none"), ("swiglu", "selective"), ("relu", "none")]
)
def test_a_compiled_block_keeps_what_the_ledger_says(activation: str, checkpointing: str):
    assert played(activation, checkpointing) == pytest.approx(partitioned(activation, checkpointing), rel=1e-3)
