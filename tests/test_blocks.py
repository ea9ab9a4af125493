"""What is done to the blocks of a model: checkpointing, compilation, 16-bit compute. In process, without ranks."""

from collections import Counter

import pytest
import torch
from processes import SPECS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.engine.blocks import prepare_blocks
from scaling.engine.precision import compute_in
from scaling.inventory import blocks, parameters
from scaling.models.decoder import decoder_recipe
from scaling.spec import load_spec

MODES = ("none", "selective", "full")


def build(mode="none", compiled=False, dtype=torch.float32, layers=3):
    spec = load_spec(str(SPECS / "gpt-parity.json"), [f"model.num_hidden_layers={layers}"])
    recipe = decoder_recipe(spec.model, spec.objective, seed=1)
    model = recipe.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(recipe.initial_value(name, parameter.shape))
    if dtype != torch.float32:
        compute_in(model, dtype)
    prepare_blocks(model, blocks(spec.model), checkpointing=mode, compiled=compiled)
    return spec, model


def backward(model):
    ids = torch.arange(128).view(2, 64) % 512
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, ids)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, sum(kept.values())


class Counted(TorchDispatchMode):
    """Counts the operations that are really run: what selective checkpointing takes from its cache is not."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_checkpointing_keeps_less_and_changes_nothing():
    runs = {mode: backward(build(mode)[1]) for mode in MODES}
    loss, gradients, kept = runs["none"]
    for mode in ("selective", "full"):
        assert runs[mode][0] == loss
        for name, gradient in gradients.items():
            torch.testing.assert_close(runs[mode][1][name], gradient, rtol=1e-6, atol=1e-7)
    # What selective keeps is in its own cache, which these hooks do not see: it is counted below.
    assert runs["full"][2] < 0.5 * kept


def test_selective_keeps_matrix_products_and_full_computes_them_again():
    counts = {}
    for mode in MODES:
        _, model = build(mode)
        with Counted() as counted:
            backward(model)
        counts[mode] = (counted.calls["aten::addmm"], counted.calls["aten::gelu"])
    products, gelus = 3 * 6, 3  # q, k, v, o, up and down of each block
    loss = 1  # the gradient of the head's weight, in any case once
    assert counts["none"] == (products + loss, gelus)
    assert counts["selective"] == (products + loss, 2 * gelus)
    # Recomputation stops before the last product of each block, whose result no gradient needs.
    assert counts["full"] == (2 * products - 3 + loss, 2 * gelus)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", MODES)
def test_one_compilation_serves_all_blocks(mode, dtype):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    _, model = build(mode, compiled=True, dtype=dtype, layers=10)  # more than dynamo's limit of recompilations
    loss, gradients, _ = backward(model)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    plain_loss, plain, _ = backward(build("none", dtype=dtype, layers=10)[1])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.item() == pytest.approx(plain_loss.item(), rel=tolerance)
    for name, gradient in gradients.items():
        if name.endswith("k_proj.bias"):
            continue  # shifts every score of a query alike: its gradient is zero but for rounding
        assert (gradient - plain[name]).norm() <= 2 * tolerance * plain[name].norm() + 1e-5, name


def test_compute_in_casts_what_is_read_and_nothing_else():
    spec, model = build(dtype=torch.bfloat16)
    assert [name for name, _ in model.named_parameters()] == [p.name for p in parameters(spec.model, spec.lora)]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.state_dict()["norm.weight"].dtype == torch.float32
    assert model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert type(model.layers[0].mlp.up_proj) is type(model.layers[2].mlp.up_proj)
    assert isinstance(model.layers[0].mlp.up_proj, nn.Linear)
    seen = []
    model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    _, gradients, _ = backward(model)
    assert seen == [torch.bfloat16]
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
