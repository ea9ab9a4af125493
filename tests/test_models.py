"""The decoder against Hugging Face's models, the chunked loss against torch's, initial values, names."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.models import loss as loss_module
from scaling.models.decoder import Decoder, decoder_recipe
from scaling.models.loss import IGNORED, summed_cross_entropy
from scaling.models.recipe import canonical_name
from scaling.spec.sections import CausalLM
from scaling.spec.sections import Decoder as DecoderSpec

VOCABULARY = 97
SIZES = dict(
    kind="decoder",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=40,
)
GPT2 = dict(norm="layernorm", activation="gelu_new", position="learned", bias=True, tie_word_embeddings=True)


def decoder_spec(**changes: Any) -> DecoderSpec:
    return DecoderSpec(**(SIZES | changes))


def random_decoder(spec: DecoderSpec, *, chunked: bool = True, seed: int = 0) -> Decoder:
    """A decoder in eval mode, all of whose tensors, norms and biases too, are random: a mix-up of two would show."""
    model = Decoder(spec, chunked=chunked).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.3, generator=generator)
    return model


def token_ids(*shape: int, seed: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- against Hugging Face


def gpt2_weights(ours: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our weights under GPT-2's names: Conv1D holds its matrices transposed, c_attn is query, key and value in one."""
    found = {
        "transformer.wte.weight": ours["embed_tokens.weight"],
        "transformer.wpe.weight": ours["embed_positions.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": ours["norm.bias"],
        "lm_head.weight": ours["embed_tokens.weight"],
    }
    single = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    for layer in range(layers):
        here, there = f"layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            for name, own in single.items():
                value = ours[f"{here}.{own}.{kind}"]
                found[f"{there}.{name}.{kind}"] = value.t() if value.ndim == 2 else value
            fused = torch.cat([ours[f"{here}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            found[f"{there}.attn.c_attn.{kind}"] = fused.t() if fused.ndim == 2 else fused
    return found


def llama_weights(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of Llama and Qwen: ours below `model.`, the head beside it."""
    head = ours.get("lm_head.weight", ours["embed_tokens.weight"])
    return {f"model.{name}": value for name, value in ours.items() if name != "lm_head.weight"} | {
        "lm_head.weight": head
    }


def hugging_face(spec: DecoderSpec, family: str) -> nn.Module:
    """A model of `family` with the sizes of `spec`, built in memory."""
    transformers = pytest.importorskip("transformers")
    common = dict(vocab_size=spec.vocab_size, attn_implementation="eager", tie_word_embeddings=spec.tie_word_embeddings)
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=spec.hidden_size,
            n_inner=spec.intermediate_size,
            n_layer=spec.num_hidden_layers,
            n_head=spec.num_attention_heads,
            n_positions=spec.max_position_embeddings,
            activation_function=spec.activation,
            layer_norm_epsilon=spec.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{names}Config")(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        **({"head_dim": spec.head_dim} if spec.head_dim else {}),
        **common,
    )
    return getattr(transformers, f"{names}ForCausalLM")(config).eval()


LLAMA = dict(num_key_value_heads=2, rope_theta=50.0)


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        pytest.param("gpt2", decoder_spec(**GPT2), id="gpt2"),
        pytest.param("gpt2", decoder_spec(**(GPT2 | {"activation": "gelu"})), id="gpt2 with exact gelu"),
        pytest.param("llama", decoder_spec(**LLAMA), id="llama"),
        pytest.param("llama", decoder_spec(**LLAMA, tie_word_embeddings=True), id="llama tied"),
        pytest.param("llama", decoder_spec(**(LLAMA | {"num_key_value_heads": 1})), id="llama, one key head"),
        pytest.param("llama", decoder_spec(**LLAMA, head_dim=6), id="llama with head_dim"),
        pytest.param("qwen2", decoder_spec(**LLAMA, qkv_bias=True, norm_eps=1e-6), id="qwen2"),
        pytest.param("qwen3", decoder_spec(**LLAMA, qk_norm=True, head_dim=16, norm_eps=1e-6), id="qwen3"),
    ],
)
def test_logits_and_gradients_equal_hugging_face(family: str, spec: DecoderSpec) -> None:
    ours = random_decoder(spec)
    theirs = hugging_face(spec, family)
    weights = dict(ours.named_parameters())

    def theirs_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return gpt2_weights(tensors, spec.num_hidden_layers) if family == "gpt2" else llama_weights(tensors)

    theirs.load_state_dict(theirs_of({name: weight.detach() for name, weight in weights.items()}), strict=True)
    ids = token_ids(2, spec.max_position_embeddings)
    want = theirs(ids).logits
    have = ours(ids)
    torch.testing.assert_close(have, want, rtol=0, atol=1e-5 * want.abs().max().item())

    targets = token_ids(2, spec.max_position_embeddings, seed=2)
    targets[0, :11] = IGNORED
    loss, reference = ours(ids, targets), F.cross_entropy(want.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    loss.backward()
    reference.backward()
    for name, gradient in theirs_of({name: weight.grad for name, weight in weights.items()}).items():
        other = theirs.get_parameter(name).grad
        torch.testing.assert_close(gradient, other, rtol=0, atol=2e-5 * other.abs().max().item(), msg=name)


# ---------------------------------------------------------------- behaviour


@pytest.mark.parametrize("spec", [decoder_spec(**GPT2), decoder_spec(**LLAMA)], ids=["gpt2", "llama"])
def test_a_later_token_changes_no_earlier_logit(spec: DecoderSpec) -> None:
    model = random_decoder(spec)
    ids = token_ids(2, 20)
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any(dim=-1).all()


def test_dropout_drops_in_training_and_not_in_eval() -> None:
    spec = decoder_spec(**GPT2, dropout=0.2)
    model, without = random_decoder(spec), random_decoder(spec.model_copy(update={"dropout": 0.0}))
    ids = token_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(model(ids), without(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))
        without.train()
        assert torch.equal(without(ids), without(ids))


def test_dropout_acts_on_embeddings_attention_and_both_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = decoder_spec(**GPT2, dropout=0.25)
    model = random_decoder(spec).train()
    dropped: list[float] = []
    attention: list[float] = []
    plain, attend = F.dropout, F.scaled_dot_product_attention

    def dropout(value: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        dropped.append(p if training else 0.0)
        return plain(value, p, training, inplace)

    def attended(*tensors: Tensor, **settings: Any) -> Tensor:
        attention.append(settings["dropout_p"])
        return attend(*tensors, **settings)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attended)
    model(token_ids(1, 4))
    assert dropped == [0.25] * (1 + 2 * spec.num_hidden_layers)
    assert attention == [0.25] * spec.num_hidden_layers


# ---------------------------------------------------------------- the chunked loss


ROWS, WIDTH, WORDS = 23, 8, 64
"""With chunks of four rows: five whole ones and one of three."""
CHUNK_ROWS = 4


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", CHUNK_ROWS * WORDS + 3)


def loss_inputs(dtype: torch.dtype = torch.float32, *, masked: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, WORDS, (ROWS,), generator=generator)
    targets[torch.randperm(ROWS, generator=generator)[:masked]] = IGNORED
    return hidden, weight, targets


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunked: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    hidden, weight = (value.detach().clone().requires_grad_(value.requires_grad) for value in (hidden, weight))
    loss = summed_cross_entropy(hidden, weight, targets, chunked=chunked)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("elements", [1, CHUNK_ROWS * WORDS, 10 * WORDS, 2**25], ids=lambda n: f"{n} elements")
@pytest.mark.parametrize("masked", [0, 7])
def test_chunked_loss_equals_plain(elements: int, masked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", elements)
    inputs = loss_inputs(masked=masked)
    have = loss_and_gradients(*inputs, chunked=True, scale=0.125)
    want = loss_and_gradients(*inputs, chunked=False, scale=0.125)
    logits = inputs[0].detach() @ inputs[1].detach().t()
    by_hand = sum(-logits[i].log_softmax(0)[t] for i, t in enumerate(inputs[2].tolist()) if t != IGNORED)
    torch.testing.assert_close(want[0], torch.as_tensor(by_hand), rtol=1e-6, atol=0)
    for one, other in zip(have, want, strict=True):
        assert one is not None and other is not None
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_chunked_loss_in_bf16_is_as_good_as_plain() -> None:
    inputs = loss_inputs(torch.bfloat16)
    hidden, weight = (value.detach().float().requires_grad_() for value in inputs[:2])
    exact = loss_and_gradients(hidden, weight, inputs[2], chunked=False)
    have = loss_and_gradients(*inputs, chunked=True)
    plain = loss_and_gradients(*inputs, chunked=False)
    assert have[0].dtype == torch.float32
    for one, other, truth in zip(have, plain, exact, strict=True):
        assert one is not None and other is not None and truth is not None
        assert one.dtype == other.dtype
        error, plain_error = ((value.float() - truth).norm() / truth.norm() for value in (one, other))
        assert error < 2**-7, error  # one unit in the last place of bf16
        assert error < 1.5 * plain_error + 1e-3, (error, plain_error)


@pytest.mark.usefixtures("small_chunks")
def test_the_weights_gradient_adds_up_in_fp32() -> None:
    # Each chunk adds 4 x 63/64; past 128, where bf16 counts in whole numbers and then in twos, it would add 4.
    hidden = torch.ones(512, WIDTH, dtype=torch.bfloat16)
    weight = torch.zeros(WORDS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    _, _, gradient = loss_and_gradients(hidden, weight, torch.zeros(512, dtype=torch.int64), chunked=True)
    assert gradient is not None
    torch.testing.assert_close(gradient[0].float(), torch.full((WIDTH,), -512 * 63 / 64), rtol=2**-8, atol=0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_targets_masked_is_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    loss, *gradients = loss_and_gradients(*loss_inputs(dtype, masked=ROWS), chunked=True)
    assert loss.item() == 0
    for gradient in gradients:
        assert gradient is not None and gradient.dtype == dtype and not gradient.any()


class Seen(TorchDispatchMode):
    """The operations that ran, how many were matrix products, and the elements of the largest tensor returned."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations.add(str(function.overloadpacket))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
def test_a_frozen_part_gets_no_gradient_and_costs_no_product(trained: str) -> None:
    hidden, weight, targets = loss_inputs()
    whole = loss_and_gradients(hidden, weight, targets, chunked=True)
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    with Seen() as seen:
        loss, *gradients = loss_and_gradients(hidden, weight, targets, chunked=True)
    assert torch.equal(loss, whole[0])
    for gradient, full, name in zip(gradients, whole[1:], ("hidden", "weight"), strict=True):
        if trained in (name, "both"):
            assert gradient is not None and full is not None and torch.equal(gradient, full)
        else:
            assert gradient is None
    chunks = -(-ROWS // CHUNK_ROWS)
    assert seen.products == chunks * (3 if trained == "both" else 2)


@pytest.mark.usefixtures("small_chunks")
def test_without_grad_only_the_loss_is_computed() -> None:
    hidden, weight, targets = loss_inputs()
    want = summed_cross_entropy(hidden, weight, targets, chunked=False).detach()
    with torch.no_grad(), Seen() as seen:
        loss = summed_cross_entropy(hidden, weight, targets, chunked=True)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want)
    assert seen.products == -(-ROWS // CHUNK_ROWS)
    assert "aten.log_softmax" in seen.operations
    assert "aten.scatter_add_" not in seen.operations, "the gradient of the logits, which nobody will ask for"


def test_chunked_loss_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, words = 4, 32, 256
    spec = decoder_spec(vocab_size=words, hidden_size=8, intermediate_size=16, num_hidden_layers=1)
    ids = token_ids(batch, length, vocabulary=words)

    def largest(chunked: bool) -> int:
        model = random_decoder(spec, chunked=chunked)
        with Seen() as seen:
            model(ids, ids).backward()
        return seen.largest

    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 8 * words)
    assert largest(chunked=False) == batch * length * words
    # Attention's scores and the MLP are the next largest; all logits would be eight times as much.
    assert largest(chunked=True) <= batch * max(4 * length * length, length * 16)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 2**25)
    assert largest(chunked=True) == batch * length * words


# ---------------------------------------------------------------- initial values and names


def initial(spec: DecoderSpec, name: str, *shape: int, seed: int = 0) -> Tensor:
    return decoder_recipe(spec, CausalLM(), seed).initial_value(name, torch.Size(shape))


def test_initial_value_depends_on_seed_name_and_shape_alone() -> None:
    spec = decoder_spec()
    name, shape = "layers.0.mlp.up_proj.weight", (48, 32)
    before = torch.get_rng_state()
    torch.manual_seed(5)
    value = initial(spec, name, *shape)
    torch.manual_seed(6)
    torch.rand(3)
    initial(spec, "embed_tokens.weight", VOCABULARY, 32)
    assert torch.equal(value, initial(spec, name, *shape))
    assert not torch.equal(value, initial(spec, name, *shape, seed=1))
    assert not torch.equal(value, initial(spec, "layers.1.mlp.up_proj.weight", *shape))
    assert not torch.equal(value, initial(spec, "layers.0.mlp.gate_proj.weight", *shape))
    assert value.dtype == torch.float32 and value.device.type == "cpu"
    torch.set_rng_state(before)


def test_initial_value_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    initial(decoder_spec(), "embed_tokens.weight", VOCABULARY, 32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "spec",
    [
        decoder_spec(hidden_size=128, intermediate_size=256, vocab_size=200, initializer_range=0.05, **GPT2),
        decoder_spec(hidden_size=128, intermediate_size=256, vocab_size=200, qkv_bias=True, qk_norm=True),
    ],
    ids=["gpt2", "llama"],
)
def test_initial_values_are_as_documented(spec: DecoderSpec) -> None:
    recipe = decoder_recipe(spec, CausalLM(), 11)
    residual = spec.initializer_range / math.sqrt(2 * spec.num_hidden_layers)
    kinds: set[str] = set()
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Decoder(spec).named_parameters()}
    for name, shape in shapes.items():
        value = recipe.initial_value(name, shape)
        assert value.shape == shape
        if name.endswith("bias"):
            kinds.add("bias")
            assert not value.any(), name
        elif "norm" in name:
            kinds.add("norm")
            assert torch.equal(value, torch.ones(shape)), name
        else:
            scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
            kinds.add("residual" if scaled else "matrix")
            want = residual if scaled else spec.initializer_range
            # Five standard deviations of the estimates, over at least 5,120 elements.
            count = shape.numel()
            assert abs(value.std().item() / want - 1) < 5 / math.sqrt(2 * count), name
            assert abs(value.mean().item()) < 5 * want / math.sqrt(count), name
    assert kinds == {"bias", "norm", "residual", "matrix"}


NAME = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "name",
    [
        NAME,
        f"module.{NAME}",
        f"_orig_mod.{NAME}",
        f"_fsdp_wrapped_module.{NAME}",
        f"_checkpoint_wrapped_module.{NAME}",
        f"module.module.{NAME}",
        f"module._orig_mod.{NAME}",
        f"_orig_mod.module.{NAME}",
        "layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight",
        "layers.0._orig_mod._checkpoint_wrapped_module._fsdp_wrapped_module.self_attn.q_proj.weight",
        "module._fsdp_wrapped_module.layers.0.module.module.self_attn._orig_mod.q_proj.weight",
    ],
)
def test_canonical_name_has_no_wrapper(name: str) -> None:
    assert canonical_name(name) == NAME


def test_canonical_name_keeps_names_that_only_end_alike() -> None:
    assert canonical_name("module.vision_module.proj.weight") == "vision_module.proj.weight"
    assert canonical_name("my_module.weight") == "my_module.weight"


def test_canonical_name_of_really_wrapped_models() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    spec = decoder_spec(**GPT2)
    plain = [name for name, _ in Decoder(spec).named_parameters()]
    model = Decoder(spec)
    model.layers = nn.ModuleList([torch.compile(checkpoint_wrapper(layer)) for layer in model.layers])  # type: ignore[misc]
    names = [name for name, _ in nn.DataParallel(torch.compile(model)).named_parameters()]  # type: ignore[arg-type]
    assert names != plain
    assert [canonical_name(name) for name in names] == plain
