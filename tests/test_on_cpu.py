"""Functions that a CPU computes in another way than torch: the same values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.models import on_cpu
from scaling.models.decoder import Decoder
from scaling.models.on_cpu import Embedding, RMSNorm, rms_norm, rotate
from scaling.spec.sections import Decoder as DecoderSpec

ROWS, WIDTH = (2, 5), 16


def gradients(result: Tensor, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [result, *torch.autograd.grad(result, inputs, torch.randn(result.shape).to(result.dtype), retain_graph=True)]


def assert_alike(found: list[Tensor], wanted: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# ---------------------------------------------------------------- RMSNorm


def test_rms_norm_is_torchs() -> None:
    x = torch.randn(*ROWS, WIDTH, requires_grad=True)
    module = RMSNorm(WIDTH, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    found = module(x)
    assert type(found.grad_fn).__name__ == "_RMSNormBackward"
    wanted = F.rms_norm(x, (WIDTH,), module.weight, 1e-5)
    assert_alike(gradients(found, [x, module.weight]), gradients(wanted, [x, module.weight]))


def test_rms_norms_gradient_is_that_of_its_values() -> None:
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: on_cpu._RMSNorm.apply(*inputs, 1e-3), (x, weight))


def test_rms_norm_of_what_does_not_lie_in_a_row() -> None:
    x = torch.randn(WIDTH, *ROWS).permute(1, 2, 0).requires_grad_()
    weight = torch.randn(WIDTH, requires_grad=True)
    found, wanted = (norm(x, (WIDTH,), weight, 1e-5) for norm in (rms_norm, F.rms_norm))
    assert_alike(gradients(found, [x, weight]), gradients(wanted, [x, weight]))


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_rms_norm_with_one_that_is_frozen(trained: str) -> None:
    inputs = {"x": torch.randn(*ROWS, WIDTH), "weight": torch.randn(WIDTH)}
    inputs[trained].requires_grad_()
    found, wanted = (norm(inputs["x"], (WIDTH,), inputs["weight"], 1e-5) for norm in (rms_norm, F.rms_norm))
    assert_alike(gradients(found, [inputs[trained]]), gradients(wanted, [inputs[trained]]))


@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 1e-5), (torch.float32, None)])
def test_rms_norm_leaves_the_rest_to_torch(dtype: torch.dtype, eps: float | None) -> None:
    x, weight = torch.randn(*ROWS, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    assert torch.equal(rms_norm(x, (WIDTH,), weight, eps), F.rms_norm(x, (WIDTH,), weight, eps))


# ---------------------------------------------------------------- rotation


def composed(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat((-second, first), dim=-1) * sines


def turn(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.rand(*shape, WIDTH // 2, dtype=torch.float64) * 6
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("places", [(5,), (2, 1, 5)], ids=["alike in all sequences", "of each sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_composed_one(places: tuple[int, ...], dtype: torch.dtype) -> None:
    heads = torch.randn(2, 5, 3, WIDTH).to(dtype).transpose(1, 2).requires_grad_()
    cosines, sines = turn(*places, dtype=dtype)
    found, wanted = (function(heads, cosines, sines) for function in (rotate, composed))
    assert found.stride() == wanted.stride()
    tolerance = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    assert_alike(gradients(found, [heads]), gradients(wanted, [heads]), **tolerance)


def test_rotations_gradient_is_that_of_its_values() -> None:
    heads = torch.randn(1, 2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    cosines, sines = turn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda heads: rotate(heads, cosines, sines), (heads,))


# ---------------------------------------------------------------- tables


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        given = {id(one) for one in torch.utils._pytree.tree_leaves(arguments)}
        result = function(*arguments, **(more or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, Tensor) and id(one) not in given and not one._is_view():
                self.elements = max(self.elements, one.numel())
        return result


def table(rows: int = 50) -> Embedding:
    module = Embedding(rows, WIDTH)
    torch.manual_seed(0)
    torch.nn.init.normal_(module.weight)
    module.writes_grad = True
    return module


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_add_up_as_torchs(tied: bool) -> None:
    """The rows of a micro-batch come several times, and of a tied table the head's gradient too."""
    found, wanted = table(), torch.nn.Embedding.from_pretrained(table().weight.detach().clone(), freeze=False)
    for seed in range(3):
        torch.manual_seed(seed)
        ids, factor = torch.randint(0, 7, ROWS), torch.randn(*ROWS, WIDTH)
        for module in (found, wanted):
            hidden = module(ids) * factor
            loss = (hidden @ module.weight.t()).square().sum() if tied else hidden.square().sum()
            loss.backward()
    assert found.weight.grad is not None and wanted.weight.grad is not None
    torch.testing.assert_close(found.weight.grad, wanted.weight.grad)


def test_only_the_first_gradient_is_as_large_as_the_table() -> None:
    module, ids, sizes = table(1000), torch.tensor([[3, 3, 9]]), []
    for _ in range(3):
        with Largest() as largest:
            module(ids).sum().backward()
        sizes.append(largest.elements)
    assert sizes[0] == 1000 * WIDTH and max(sizes[1:]) <= 3 * WIDTH
    assert module.weight.grad is not None
    assert module.weight.grad[[3, 9, 4], 0].tolist() == [6.0, 3.0, 0.0]


def test_a_frozen_table_takes_no_gradient() -> None:
    module = table()
    module.weight.requires_grad_(False)
    assert not module(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("frozen", [(), ("embed_tokens",), ("lm_head",)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_has_the_same_gradients_in_place(tied: bool, frozen: tuple[str, ...]) -> None:
    shape = dict(vocab_size=60, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    spec = DecoderSpec(kind="decoder", max_position_embeddings=8, tie_word_embeddings=tied, **shape)
    found: list[dict[str, Tensor | None]] = []
    for writes_grad in (False, True):
        model = Decoder(spec)
        torch.manual_seed(3)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        for name in frozen:
            model.get_submodule(name).weight.requires_grad_(False)
        model.embed_tokens.writes_grad = model.lm_head.writes_grad = writes_grad
        for seed in range(3):
            torch.manual_seed(seed)
            ids = torch.randint(0, 60, (2, 9))
            targets = ids[:, 1:].clone()
            targets[0, :3] = -100
            (model(ids[:, :-1], targets) * 0.25).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    wanted, there = found
    for name in wanted:
        torch.testing.assert_close(there[name], wanted[name])


# ---------------------------------------------------------------- compiled


def test_compiled_code_is_torchs() -> None:
    """It has kernels of its own, and must not be broken by a function that it cannot look into."""
    module, heads = RMSNorm(WIDTH, eps=1e-5), torch.randn(1, 2, 3, WIDTH)
    torch.nn.init.ones_(module.weight)
    cosines, sines = turn(3)
    compiled = torch.compile(lambda heads: rotate(module(heads), cosines, sines), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(heads), rotate(module(heads), cosines, sines))
