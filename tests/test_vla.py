"""The vision-language-action model: its inventory, its parts, its losses, its data; and that it learns."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import SPECS, torchrun
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scaling.checkpoint.format import Reader
from scaling.checkpoint.store import Store
from scaling.data.actions import SyntheticActions
from scaling.data.loader import step_batches, validation_batches
from scaling.estimate.flops import train_flops_per_token
from scaling.inventory import blocks, parameters, sample_length, still, text_length
from scaling.models.build import model_recipe
from scaling.models.vla import Language, Vision, Vla
from scaling.objectives import build_objective
from scaling.objectives.behaviour_cloning import TIMES, draws
from scaling.spec import SpecError, load_spec
from scaling.spec.sections import BehaviourCloning
from scaling.spec.sections import Vla as VlaSpec
from scaling.train import main

SECTION: dict[str, Any] = json.loads((SPECS / "vla-parity.json").read_text())["model"]
TOKENS = 10


def vla_spec(**changes: dict[str, Any]) -> VlaSpec:
    parts = {part: SECTION[part] | changes.get(part, {}) for part in ("vision", "language", "fusion", "action")}
    return VlaSpec.model_validate_json(json.dumps({"kind": "vla", **parts}))


SPECS_OF = {
    "as the tests train it": vla_spec(),
    "velocity": vla_spec(action={"head": "velocity"}),
    "one view, odd depth, another width": vla_spec(
        vision={"views": 1, "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 2}
    ),
    "GPT-2's language": vla_spec(
        language={"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True}
    ),
    "Qwen's language": vla_spec(language={"qkv_bias": True, "qk_norm": True, "head_dim": 10}),
    "recipe atlas-vla": load_spec("atlas-vla").model,
    "recipe atlas-vla-tiny": load_spec("atlas-vla-tiny").model,
}


def random_vla(spec: VlaSpec, frozen: tuple[str, ...] = ()) -> Vla:
    """A model all of whose tensors are random, in training mode, with the parameters that begin so frozen."""
    model = Vla(spec, Vision(spec.vision), Language(spec.language))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
            parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    return model.train()


def demonstrations(spec: VlaSpec, masked: float = 0.0) -> SyntheticActions:
    return SyntheticActions(7, 0, 1000, spec, TOKENS, masked)


def batch_of(spec: VlaSpec, count: int = 3, masked: float = 0.0) -> Any:
    return demonstrations(spec, masked).read(np.arange(count))


# ---------------------------------------------------------------- inventory


@pytest.mark.parametrize("name", SPECS_OF)
def test_names_shapes_and_blocks_are_the_modules(name: str) -> None:
    spec = SPECS_OF[name]
    assert isinstance(spec, VlaSpec)
    with torch.device("meta"):
        model = Vla(spec, Vision(spec.vision), Language(spec.language))
    real = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(parameter.name, parameter.shape) for parameter in parameters(spec)] == real
    assert {name.partition(".")[0] for name, _ in real} == {"vision", "language", "fusion", "action_head"}
    layers = [*model.vision.layers, *model.language.layers, *model.fusion.layers]
    assert [model.get_submodule(path) for path in blocks(spec)] == layers


def test_initial_values_are_of_their_part() -> None:
    spec = load_spec(str(SPECS / "vla-parity.json"))
    recipe = model_recipe(spec)
    values = {p.name: recipe.initial_value(p.name, torch.Size(p.shape)) for p in parameters(spec.model)}
    assert all(torch.equal(values[n], torch.ones_like(values[n])) for n in values if n.endswith("norm.weight"))
    assert values["fusion.layers.0.cross_attn.o_proj.weight"].std() == pytest.approx(0.02 / 2, rel=0.1)
    assert values["fusion.layers.0.cross_attn.q_proj.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert not values["action_head.bias"].any() and values["action_head.weight"].any()


def test_an_untrained_backbone_tells_patches_and_places_at_one_scale() -> None:
    spec = load_spec(str(SPECS / "vla-parity.json"))
    recipe = model_recipe(spec)
    values = {p.name: recipe.initial_value(p.name, torch.Size(p.shape)) for p in parameters(spec.model)}
    places, patch = values["vision.embed_positions.weight"], values["vision.patch_embed.weight"]
    apart = torch.cdist(places, places) + torch.eye(len(places)) * 1e3
    assert apart.min() > 0.5
    assert places.square().mean() == pytest.approx(0.5, rel=0.01)
    assert (torch.randn(200, patch.shape[1]) @ patch.T).std() == pytest.approx(1.0, rel=0.2)


def test_each_part_has_its_own_initial_range() -> None:
    spec = load_spec(str(SPECS / "vla-parity.json"))
    fusion = spec.model.fusion.model_copy(update={"initializer_range": 0.2})
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"fusion": fusion})})
    recipe = model_recipe(spec)
    deviation = {p.name: recipe.initial_value(p.name, torch.Size(p.shape)).std() for p in parameters(spec.model)}
    assert deviation["fusion.layers.0.cross_attn.q_proj.weight"] == pytest.approx(0.2, rel=0.1)
    assert deviation["language.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.1)


def positions(model) -> int:
    return sample_length(SimpleNamespace(model=model, data=SimpleNamespace(sequence_length=TOKENS)))


def test_a_sample_has_positions_of_all_it_is_made_of() -> None:
    spec = vla_spec()
    length = positions(spec)
    assert length == 2 * 16 + TOKENS + 6 and text_length(spec, length) == TOKENS


# ---------------------------------------------------------------- parts


def test_even_blocks_look_within_a_view_and_odd_ones_over_all() -> None:
    images = batch_of(vla_spec()).images
    other = images.clone()
    other[:, 1] = 255 - other[:, 1]
    for layers, same in ((1, True), (2, False)):
        vision = random_vla(vla_spec(vision={"num_hidden_layers": layers})).vision
        seen = [vision(some).unflatten(1, (2, -1)) for some in (images, other)]
        assert torch.equal(seen[0][:, 0], seen[1][:, 0]) == same
        assert not torch.allclose(seen[0][:, 1], seen[1][:, 1])


def test_views_and_places_are_told_apart() -> None:
    images = batch_of(vla_spec()).images
    vision = random_vla(vla_spec(vision={"num_hidden_layers": 1})).vision
    both = vision(images[:, :1].expand(-1, 2, -1, -1, -1).contiguous()).unflatten(1, (2, -1))
    assert not torch.allclose(both[:, 0], both[:, 1])
    plain = vision(torch.full_like(images, 100)).unflatten(1, (2, -1))
    assert not torch.allclose(plain[:, :, 0], plain[:, :, 1])


def test_patches_are_squares_of_the_image() -> None:
    spec = vla_spec()
    embed = random_vla(spec).vision.patch_embed
    images = batch_of(spec).images
    square = images[1, 1, 4:8, 12:16].reshape(-1).float() / 127.5 - 1  # row 1, column 3 of four
    assert torch.allclose(embed(images)[1, 1, 7], embed.weight @ square + embed.bias, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_encoder_does_not_look_ahead(causal: bool) -> None:
    language = random_vla(vla_spec(language={"causal": causal})).language
    first = torch.arange(TOKENS).unsqueeze(0)
    second = first.clone()
    second[0, -1] = 50
    before = [language(ids)[:, :-1] for ids in (first, second)]
    assert torch.allclose(*before) == causal


@pytest.mark.parametrize("part", ["images", "instruction", "state"])
def test_actions_depend_on_all_inputs(part: str) -> None:
    spec = vla_spec()
    model, batch = random_vla(spec).eval(), batch_of(spec, 8)
    inputs = {"images": batch.images, "instruction": batch.instruction, "state": batch.state}
    changed = model(**(inputs | {part: inputs[part].flip(0)}))
    assert not torch.allclose(model(**inputs), changed, atol=1e-4)


@pytest.mark.parametrize(
    ("frozen", "parts"),
    [
        ((), ()),
        (("vision.",), ("vision",)),
        (("language.",), ("language",)),
        (("vision.layers.", "language."), ("language",)),
        (("vision.", "language."), ("vision", "language")),
        (("vision.", "fusion."), ("vision",)),
        (("vision.", "language.", "fusion."), ("vision", "language", "fusion")),
    ],
)
def test_parts_that_no_gradient_comes_to_keep_nothing_and_are_still(
    frozen: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    spec = vla_spec(vision={"dropout": 0.5}, language={"dropout": 0.5}, fusion={"dropout": 0.5})
    model, batch = random_vla(spec, frozen), batch_of(spec)
    assert still(spec, {name for name, p in model.named_parameters() if not p.requires_grad}) == parts
    results: dict[str, list[torch.Tensor]] = {}
    kept: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda _module, _inputs, output: results.setdefault(name, []).append(output)

    for name in ("vision", "language", "fusion"):
        getattr(model, name).register_forward_hook(note(name))
        assert all(module.training != (name in parts) for module in getattr(model, name).modules())
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update(n=kept.get("n", 0) + 1) or t, lambda t: t):
            loss = build_objective(BehaviourCloning(kind="behaviour_cloning"))(model, batch)
    for name, (first, second) in results.items():
        assert first.requires_grad == (name not in parts), name
        before_changes = name == "fusion" and set(parts) < {"vision", "language", "fusion"}
        assert torch.equal(first, second) == (name in parts) or before_changes, "dropout of a still part is off"
    if len(parts) == 3:
        assert kept["n"] / 2 <= 6, "the head and the loss alone"
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    model.eval()
    assert not any(module.training for module in model.modules())
    model.requires_grad_(True).train()
    assert all(module.training for module in model.modules())


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("error", ["l1", "mse"])
def test_a_regression_is_the_sum_over_what_is_no_padding(error: str) -> None:
    spec = vla_spec()
    model, batch = random_vla(spec), batch_of(spec, 8, masked=0.4)
    assert 0 < batch.action_is_pad.sum() < batch.action_is_pad.numel()
    loss = build_objective(BehaviourCloning(kind="behaviour_cloning", error=error))(model, batch)
    kept = ~batch.action_is_pad
    predicted = model(batch.images, batch.instruction, batch.state)[kept]
    measure = torch.nn.functional.l1_loss if error == "l1" else torch.nn.functional.mse_loss
    assert loss.item() == pytest.approx(measure(predicted, batch.actions[kept], reduction="sum").item(), rel=1e-5)
    assert batch.terms == kept.sum() * 7
    assert loss.dtype == torch.float32
    batch.actions[batch.action_is_pad] = float("nan")
    again = build_objective(BehaviourCloning(kind="behaviour_cloning", error=error))(model, batch)
    again.backward()
    assert torch.equal(again, loss) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_noise_is_normal_and_a_function_of_the_key_alone() -> None:
    keys = torch.from_numpy(np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 2000))
    time, noise = draws(keys, 42)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(noise.numpy().T) - np.eye(42)).max() < 0.12
    assert ((time * TIMES) % 1 == 0).all() and time.min() >= 0 and time.max() < 1 and abs(time.mean() - 0.498) < 0.03
    assert torch.equal(time.bfloat16().float(), time), "no backend rounds it"
    some = draws(keys[100:103], 42)
    assert torch.equal(some[0], time[100:103]) and torch.equal(some[1], noise[100:103])


def test_flow_matching_wants_the_velocity_from_noise_to_actions() -> None:
    spec = vla_spec(action={"head": "velocity"})
    batch = batch_of(spec, 8, masked=0.4)
    given: list[Any] = []

    class Perfect(torch.nn.Module):
        """Knows the actions, and so the velocity that leads there."""

        def forward(self, _images: Any, _instruction: Any, _state: Any, noised: Any, time: Any) -> torch.Tensor:
            given.append((noised, time))
            return (batch.actions - noised) / (1 - time.view(-1, 1, 1))

    objective = build_objective(BehaviourCloning(kind="behaviour_cloning", loss="flow_matching"))
    assert objective(Perfect(), batch).item() / batch.terms < 1e-6
    time, noise = draws(batch.keys, 42)
    along = time.view(-1, 1, 1)
    wanted = batch.actions - noise.view(8, 6, 7)
    assert torch.allclose(given[0][0], noise.view(8, 6, 7) + along * wanted, atol=1e-5)
    model = random_vla(spec)
    velocity = model(batch.images, batch.instruction, batch.state, given[0][0], time)
    apart = (velocity - wanted)[~batch.action_is_pad].square().sum()
    assert objective(model, batch).item() == pytest.approx(apart.item(), rel=1e-5)


# ---------------------------------------------------------------- FLOPs

FROZEN = {
    "nothing": (),
    "vision": ("vision.",),
    "vision and language": ("vision.", "language."),
    "all but the head": ("vision.", "language.", "fusion."),
    "the fusion's blocks": ("fusion.layers.",),
    "first blocks": ("vision.patch", "vision.embed", "vision.layers.0.", "language.embed", "language.layers.0."),
}


@pytest.mark.parametrize("head", ["direct", "velocity"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_flops_are_what_torch_counts(frozen: str, head: str) -> None:
    spec = vla_spec(action={"head": head}, vision={"num_hidden_layers": 3})
    model, batch = random_vla(spec, FROZEN[frozen]), batch_of(spec, 2)
    objective = build_objective(
        BehaviourCloning(kind="behaviour_cloning", loss="flow_matching" if head == "velocity" else "regression")
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(model, batch).backward()
    length = positions(spec)
    names = {name for name, p in model.named_parameters() if not p.requires_grad}
    have = train_flops_per_token(spec, length, names) * 2 * length
    assert have == pytest.approx(counter.get_total_flops(), rel=0.01)


# ---------------------------------------------------------------- data


def test_a_sample_is_a_function_of_its_index_alone() -> None:
    data = demonstrations(vla_spec(), 0.3)
    one, many = data.read(np.array([5])), data.read(np.arange(10))
    for part in ("images", "instruction", "state", "actions", "action_is_pad", "keys"):
        assert torch.equal(getattr(one, part)[0], getattr(many, part)[5]), part
    assert len({tuple(actions.flatten().tolist()) for actions in many.actions}) == 10
    other = SyntheticActions(7, 1, 1000, vla_spec(), TOKENS).read(np.array([5]))
    assert not torch.equal(other.state, one.state)


def test_shapes_types_and_padding() -> None:
    batch = batch_of(vla_spec(), 400, masked=0.3)
    assert batch.images.shape == (400, 2, 16, 16, 3) and batch.images.dtype == torch.uint8
    assert batch.instruction.shape == (400, TOKENS) and batch.instruction.max() < 61
    assert batch.state.shape == (400, 5) and batch.actions.shape == (400, 6, 7)
    assert 0.2 < batch.action_is_pad.float().mean() < 0.32 and not batch.action_is_pad[:, 0].any()
    assert (batch.action_is_pad.int().diff(dim=1) >= 0).all(), "padding is at the end"
    assert not batch_of(vla_spec(), 400).action_is_pad.any()


def test_noise_is_drawn_by_the_place_in_the_run_whatever_the_ranks() -> None:
    data = demonstrations(vla_spec())

    def keys(world_size: int, micro: int, steps: tuple[int, ...]) -> list[list[int]]:
        found: list[dict[int, int]] = [{} for _ in steps]
        for rank in range(world_size):
            accumulation = 12 // (world_size * micro)
            batches = step_batches(
                data,
                seed=3,
                micro_batch=micro,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                first_samples=[12 * step for step in steps],
                device=torch.device("cpu"),
            )
            for number, step in enumerate(batches):
                for a, batch in enumerate(step):
                    places = (a * world_size + rank) * micro + np.arange(micro)
                    found[number].update(zip(places.tolist(), batch.keys.tolist(), strict=True))  # pyright: ignore
        return [[step[place] for place in range(12)] for step in found]

    alone = keys(1, 3, (0, 1, 100))
    assert keys(2, 2, (0, 1, 100)) == keys(3, 4, (0, 1, 100)) == alone
    assert len({key for step in alone for key in step}) == 36, "another epoch draws other noise"


def test_validation_leaves_out_what_is_too_much() -> None:
    data = demonstrations(vla_spec())
    shares = [
        sum(b.terms for b in validation_batches(data, samples=5, micro_batch=2, rank=rank, world_size=2))
        for rank in range(2)
    ]
    assert sum(shares) == 5 * 6 * 7


# ---------------------------------------------------------------- what a user gets wrong


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.vision.image_size=17"], "`model.vision.image_size` must be a multiple of patch_size (4), but is 17"),
        (["model.vision.num_attention_heads=3"], "`model.vision.hidden_size` must be a multiple of num_attention"),
        (["model.fusion.num_attention_heads=5"], "`model.fusion.hidden_size` must be a multiple of num_attention"),
        (["model.language.tie_word_embeddings=true"], "`model.language.tie_word_embeddings` must be false"),
        (["data.sequence_length=17"], "model.language.max_position_embeddings (16), but is 17"),
        (['objective={"kind":"causal_lm"}'], '`objective.kind` must be "behaviour_cloning" for a model of kind "vla"'),
        (["objective.loss=flow_matching"], '`model.action.head` must be "velocity" for the loss "flow_matching"'),
        (["model.action.head=velocity"], '`model.action.head` must be "direct" for the loss "regression"'),
        (
            ["objective.loss=flow_matching", "objective.error=l1", "model.action.head=velocity"],
            '`objective.error` must be absent for the loss "flow_matching"',
        ),
        (
            ['data={"kind":"text","train":["python-stdlib"],"sequence_length":8}'],
            '`data.kind` must be "episodes" or "synthetic"',
        ),
        (["model.vision.patchsize=4"], "did you mean `patch_size`?"),
    ],
)
def test_what_does_not_fit_is_said(settings: list[str], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(str(SPECS / "vla-parity.json"), settings)
    assert said in str(caught.value)


# ---------------------------------------------------------------- training


def masters(folder: Any, step: int) -> dict[str, torch.Tensor]:
    reader = Reader(Store(folder / "checkpoints").path(step))
    return {
        key.removeprefix("master/"): reader.read(key, 0, elements)
        for key, elements in reader.elements.items()
        if key.startswith("master/")
    }


def curve(folder: Any) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_what_is_frozen_stays_to_the_bit(tmp_path: Any) -> None:
    spec, run = str(SPECS / "vla-parity.json"), tmp_path / "run"
    sets = ["max_steps=120", 'checkpoint={"interval":200}', "profile.interval=1", "batch.micro_batch_size=16"]
    assert main(["--spec", spec, "--run-dir", str(run), *[w for s in sets for w in ("--set", s)]]) == 0
    losses = curve(run)
    assert np.mean(losses[-10:]) < 0.55 * losses[0], losses[::10]
    recipe = model_recipe(load_spec(spec))
    shapes = {p.name: torch.Size(p.shape) for p in parameters(load_spec(spec).model)}
    for name, value in masters(run, 120).items():
        start = recipe.initial_value(name, shapes[name]).flatten()
        if name.startswith("vision."):
            assert torch.equal(value.flatten(), start), name
        elif name.endswith("_proj.weight"):
            assert not torch.equal(value.flatten(), start), name


@pytest.mark.long
def test_a_run_moves_between_backends(tmp_path: Any) -> None:
    """Two ranks of FSDP2, then two of ZeRO-3, then one process: the curve of one that nothing disturbed."""
    spec = str(SPECS / "vla-parity.json")
    flow = ["objective.loss=flow_matching", "model.action.head=velocity"]
    sets = [*flow, "max_steps=9", "profile.interval=1", 'checkpoint={"interval":3}', "tracking.tensorboard=false"]
    words = [word for setting in sets for word in ("--set", setting)]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert main(["--spec", spec, "--run-dir", str(whole), *words]) == 0
    for stop, backend in ((3, {"kind": "fsdp"}), (6, {"kind": "deepspeed", "zero_stage": 3})):
        command = ["launch/train.py", "--spec", spec, "--run-dir", str(moved), *words, "--stop-after", str(stop)]
        done = torchrun(2, *command, "--set", f"backend={json.dumps(backend)}", timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert main(["--spec", spec, "--run-dir", str(moved), *words]) == 0
    assert curve(moved) == pytest.approx(curve(whole), rel=1e-5)
    first, second = masters(whole, 9), masters(moved, 9)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-4, atol=1e-5), name
