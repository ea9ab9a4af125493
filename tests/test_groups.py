"""Parameter groups: ordered rules, every parameter in exactly one group, and messages that help."""

from typing import Any

import pytest

from scaling.errors import UserError
from scaling.groups import Group, empty_groups, group_of, resolve_groups
from scaling.inventory import Parameter, parameters
from scaling.spec import load_spec
from scaling.spec.sections import AdamW, Decoder, ParamGroup
from scaling.spec.source import recipes

MODEL = Decoder(
    kind="decoder",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
    norm="layernorm",
    activation="gelu",
    position="learned",
    bias=True,
    tie_word_embeddings=True,
)
ALL = parameters(MODEL)
NAMES = [parameter.name for parameter in ALL]
ADAMW = AdamW(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
REST = {"name": "rest", "match": ["*"]}


def resolve(*rules: dict[str, Any], optimizer: AdamW = ADAMW, **settings: Any) -> tuple[Group, ...]:
    return resolve_groups([ParamGroup(**rule) for rule in rules], optimizer, ALL, **settings)


def refusal(*rules: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*rules)
    assert caught.value.code == 2
    return str(caught.value)


def matching(*prefixes: str) -> tuple[str, ...]:
    return tuple(name for name in NAMES if name.startswith(prefixes))


def is_partition(groups: tuple[Group, ...], all_of: tuple[Parameter, ...] = ALL) -> bool:
    """Every parameter stands in exactly one group, and the counts add up."""
    listed = [name for group in groups for name in group.names]
    sizes = {parameter.name: parameter.elements for parameter in all_of}
    counted = all(group.parameters == sum(sizes[name] for name in group.names) for group in groups)
    return sorted(listed) == sorted(sizes) and len(listed) == len(set(listed)) and counted


def test_the_first_rule_that_matches_wins() -> None:
    block, norms, rest = resolve(
        {"name": "block", "match": ["layers.0.*"]}, {"name": "norms", "match": ["*norm*"]}, REST
    )
    assert block.names == matching("layers.0.")
    assert norms.names == tuple(name for name in NAMES if "norm" in name and not name.startswith("layers.0."))
    assert rest.names == tuple(name for name in NAMES if "norm" not in name and not name.startswith("layers.0."))
    assert is_partition((block, norms, rest))


def test_groups_stand_in_the_order_of_the_rules_and_names_in_the_models() -> None:
    groups = resolve({"name": "b", "match": ["norm.*", "layers.1.*"]}, {"name": "a", "match": ["embed_*"]}, REST)
    assert [group.name for group in groups] == ["b", "a", "rest"]
    for group in groups:
        assert list(group.names) == [name for name in NAMES if name in group.names]
        assert group.tensors == len(group.names)


def test_globs_are_whole_names_case_matters_and_a_star_crosses_dots() -> None:
    groups = resolve({"name": "q", "match": ["*.[qk]_proj.weight"]}, {"name": "x", "match": ["norm.weigh?"]}, REST)
    assert groups[0].names == tuple(name for name in NAMES if name.endswith(("q_proj.weight", "k_proj.weight")))
    assert groups[1].names == ("norm.weight",)
    for glob in ("layers", "Layers.*", "embed_tokens", "q_proj.weight", "norm.weight "):
        assert "matches none" in refusal({"name": "x", "match": [glob]}, REST)


def test_groups_have_their_own_settings_or_the_optimizers() -> None:
    own, rest = resolve(
        {"name": "own", "match": ["layers.*"], "lr": 5e-5, "weight_decay": 0.0, "betas": (0.5, 0.6)}, REST
    )
    assert (own.lr, own.weight_decay, own.betas, own.frozen) == (5e-5, 0.0, (0.5, 0.6), False)
    assert (rest.lr, rest.weight_decay, rest.betas, rest.frozen) == (1e-3, 0.1, (0.9, 0.95), False)


def test_the_lr_scale_multiplies_every_lr_that_trains() -> None:
    frozen, own, rest = resolve(
        {"name": "frozen", "match": ["embed_*"], "freeze": True},
        {"name": "own", "match": ["layers.*"], "lr": 5e-5},
        REST,
        lr_scale=8.0,
    )
    assert (frozen.lr, own.lr, rest.lr) == (None, 4e-4, 8e-3)


def test_a_frozen_group_has_no_settings_and_is_not_split() -> None:
    optimizer = ADAMW.model_copy(update={"decay": "matrices"})
    frozen, *others = resolve({"name": "f", "match": ["layers.*"], "freeze": True}, REST, optimizer=optimizer)
    assert (frozen.name, frozen.names, frozen.frozen) == ("f", matching("layers."), True)
    assert (frozen.lr, frozen.weight_decay, frozen.betas) == (None, None, None)
    assert [group.name for group in others] == ["rest", "rest/undecayed"]
    assert not any(group.frozen for group in others)
    assert is_partition((frozen, *others))


def test_decay_of_matrices_leaves_norms_and_biases_out() -> None:
    optimizer = ADAMW.model_copy(update={"decay": "matrices"})
    groups = resolve(
        {"name": "norms", "match": ["norm.*"]},
        {"name": "block", "match": ["layers.0.*"], "lr": 2e-4, "weight_decay": 0.3, "betas": (0.8, 0.9)},
        {"name": "tables", "match": ["embed_*"]},
        REST,
        optimizer=optimizer,
        lr_scale=0.5,
    )
    assert [group.name for group in groups] == [
        "norms/undecayed",
        "block",
        "block/undecayed",
        "tables",
        "rest",
        "rest/undecayed",
    ]
    shapes = {parameter.name: parameter.shape for parameter in ALL}
    for group in groups:
        split = group.name.endswith("/undecayed")
        assert all((len(shapes[name]) < 2) == split for name in group.names)
        assert group.weight_decay == (0.0 if split else 0.3 if group.name == "block" else 0.1)
    block, undecayed = groups[1:3]
    assert (block.lr, block.betas) == (undecayed.lr, undecayed.betas) == (1e-4, (0.8, 0.9))
    assert is_partition(groups)


def test_decay_of_all_splits_nothing() -> None:
    (group,) = resolve(REST)
    assert (group.name, group.names, group.weight_decay) == ("rest", tuple(NAMES), 0.1)


def test_an_empty_group_is_dropped_and_named() -> None:
    rules = [
        {"name": "blocks", "match": ["layers.*"]},
        {"name": "mlp", "match": ["*.mlp.*", "layers.1.*"]},
        REST,
        {"name": "late", "match": ["norm.weight"]},
    ]
    for decay in ("all", "matrices"):
        groups = resolve(*rules, optimizer=ADAMW.model_copy(update={"decay": decay}))
        assert {group.name.removesuffix("/undecayed") for group in groups} == {"blocks", "rest"}
        assert empty_groups([ParamGroup(**rule) for rule in rules], groups) == ("mlp", "late")
        assert is_partition(groups)


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_a_group_of_biases_alone_is_not_empty(decay: str) -> None:
    rules = [ParamGroup(name="biases", match=["*.bias"]), ParamGroup(**REST)]
    groups = resolve_groups(rules, ADAMW.model_copy(update={"decay": decay}), ALL)
    assert empty_groups(rules, groups) == ()


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("layer.*", "'layers.*'"),
        ("layers.*.attn.*", "'layers.*.self_attn.*'"),
        ("embed_token.weight", "'embed_tokens.weight'"),
        ("lm_head.weight", "weight'"),  # tied: the head is the embedding, and has no name of its own
        ("#", "'embed_tokens.weight'"),
    ],
)
def test_a_glob_that_matches_nothing_is_refused_with_near_names(glob: str, near: str) -> None:
    message = refusal({"name": "a", "match": ["norm.*", glob]}, REST)
    assert message.startswith(f"`param_groups.0.match.1` must match a parameter, but {glob!r} matches none; ")
    assert near in message.partition("did you mean ")[2]


def test_a_glob_that_earlier_rules_exhausted_is_no_mistake() -> None:
    assert [group.name for group in resolve(REST, {"name": "late", "match": ["layers.1.mlp.*"]})] == ["rest"]


def test_a_parameter_that_no_rule_matches_is_refused() -> None:
    message = refusal({"name": "a", "match": ["embed_*", "layers.*"]})
    assert message.startswith("`param_groups` must match every parameter, but no rule matches 'norm.weight'; ")
    assert '{"name": "rest", "match": ["*"]}' in message


def test_all_frozen_is_refused() -> None:
    message = refusal({"name": "a", "match": ["layers.*"], "freeze": True}, REST | {"freeze": True})
    assert message == "`param_groups` must leave something to train, but every group is frozen; unfreeze one"
    # The rule that would train is empty: nothing is left all the same.
    assert "every group is frozen" in refusal(REST | {"freeze": True}, {"name": "late", "match": ["norm.*"]})


def test_tied_weights_appear_once() -> None:
    groups = resolve({"name": "tables", "match": ["embed_tokens.*"]}, REST)
    assert groups[0].names == ("embed_tokens.weight",)
    assert groups[0].parameters == 50 * 16
    assert not any("lm_head" in name for group in groups for name in group.names)
    untied = parameters(MODEL.model_copy(update={"tie_word_embeddings": False}))
    both = resolve_groups([ParamGroup(name="all", match=["*"])], ADAMW, untied)
    assert both[0].parameters == sum(group.parameters for group in groups) + 50 * 16


def test_group_of_finds_every_parameter() -> None:
    groups = resolve({"name": "block", "match": ["layers.0.*"]}, REST)
    found = group_of(groups)
    assert set(found) == set(NAMES)
    assert all(name in found[name].names for name in NAMES)


@pytest.mark.parametrize("name", recipes())
def test_the_groups_of_recipes_hold_the_whole_model(name: str) -> None:
    spec = load_spec(name)
    everything = parameters(spec.model)
    groups = resolve_groups(spec.param_groups, spec.optimizer, everything)
    assert is_partition(groups, everything)
    assert sum(group.parameters for group in groups) == sum(parameter.elements for parameter in everything)


def test_thousands_of_rules_and_parameters_take_a_moment() -> None:
    import time

    many = tuple(Parameter(f"layers.{i}.part.{j}.weight", (2, 2)) for i in range(100) for j in range(10))
    rules = [ParamGroup(name=f"g{i}", match=[f"layers.{i}.*"]) for i in range(100)]
    started = time.perf_counter()
    assert len(resolve_groups(rules, ADAMW, many)) == 100
    assert time.perf_counter() - started < 2
