"""Wrong specs by the thousand: valid ones with something broken, each a pure function of a seed and an index."""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

Spec = dict[str, Any]
Path = tuple[str | int, ...]

SMALL: Spec = {
    "$schema": "schema.json",
    "name": "job",
    "seed": 1,
    "model": {
        "kind": "decoder",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
    },
    "batch": {"global_batch_size": 8, "micro_batch_size": 1, "gradient_accumulation_steps": "auto"},
    "optimizer": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.95]},
    "param_groups": [
        {"name": "embedding", "match": ["embed*"], "freeze": True},
        {"name": "rest", "match": ["*"], "lr": 1e-4, "weight_decay": 0.0, "betas": [0.9, 0.99]},
    ],
    "lr_scaling": {"rule": "sqrt", "reference_global_batch_size": 8},
    "max_steps": 10,
    "validation": {"interval": 5, "batches": 1},
    "tracking": {"wandb": {"project": "p"}, "prometheus": {"port": 0}},
}
"""What the specs of `maximal_specs` have in common."""

_VLA: Spec = {
    "model": {
        "kind": "vla",
        "vision": {
            "image_size": 16,
            "patch_size": 4,
            "views": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "language": {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
        },
        "fusion": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        "action": {"action_dim": 7, "chunk_size": 6, "state_dim": 5, "head": "direct"},
    },
    "objective": {"kind": "behaviour_cloning", "loss": "regression", "error": "mse"},
    "data": {"kind": "synthetic", "sequence_length": 64},
    "param_groups": [{"name": "vision", "match": ["vision.*"], "freeze": True}, {"name": "rest", "match": ["*"]}],
}
"""A model of another kind, with what goes with it."""
_EPISODES: Spec = _VLA | {
    "data": {"kind": "episodes", "train": ["simulated-arm"], "tokenizer": "words.json", "sequence_length": 24},
    "initialize_parts": [{"part": "vision", "path": "vit", "names": {"patch_embed.*": "projection.*"}}],
}
"""It with demonstrations, and weights of one part."""

_HUGGINGFACE_VLA: Spec = _EPISODES | {
    "model": {
        "kind": "huggingface_vla",
        "vision": {"kind": "huggingface", "path": "model", "image_size": 16, "views": 2},
        "language": {"kind": "huggingface", "path": "model"},
        "fusion": _VLA["model"]["fusion"],
        "action": _VLA["model"]["action"],
        "inventory": "model.json",
    },
    "initialize_parts": [],
}
"""It with parts by transformers."""

_WORDS: Spec = {"train": ["*.jsonl"], "tokenizer": "words.json", "sequence_length": 64}
_SFT: Spec = {"objective": {"kind": "sft", "cross_entropy": "plain"}, "data": {"kind": "chat", **_WORDS}}
_DPO: Spec = {"objective": {"kind": "dpo", "beta": 0.2}, "data": {"kind": "preference", **_WORDS}}
_PPO: Spec = {
    "model": SMALL["model"] | {"value_head": True},
    "objective": {"kind": "ppo", "reward": {"kind": "pattern", "pattern": "yes"}, "max_new_tokens": 8},
    "data": {"kind": "chat", "packing": False, **_WORDS},
}
"""Objectives with the data that they want."""

_RECORDED: Spec = {"data": {"kind": "synthetic", "sequence_length": 64}, "param_groups": SMALL["param_groups"][1:]}
_FACTORY: Spec = _RECORDED | {
    "model": {"kind": "factory", "target": "my_code.models:build", "arguments": {"layers": 2}, "inventory": "own.json"},
    "data": {"kind": "factory", "target": "my_code.data:build", "sequence_length": 64},
}
_HUGGINGFACE: Spec = _RECORDED | {"model": {"kind": "huggingface", "path": "model", "inventory": "model.json"}}
"""Models whose parts are in a file."""

_VARIANTS: dict[str, list[Any]] = {
    "lora": [None, {"rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj"]}],
    "objective": [
        {"kind": "causal_lm", "cross_entropy": "plain"},
        {"kind": "factory", "target": "my_code.losses:build", "arguments": {"weight": 0.5}},
    ],
    "data": [
        {"kind": "synthetic", "sequence_length": 64},
        {
            "kind": "text",
            "train": ["*.txt"],
            "validation": ["held/*.txt"],
            "sequence_length": 64,
            "sequence_curriculum": {"min_length": 16, "steps": 4},
        },
        {"kind": "tokens", "train": ["*.bin"], "ignore_token_id": 0, "sequence_length": 64},
    ],
    "schedule": [
        {"kind": "cosine", "warmup_steps": 2},
        {"kind": "constant", "warmup_steps": 2},
        {"kind": "linear", "warmup_steps": 2},
        {"kind": "cosine_with_restarts", "cycles": 2},
        {"kind": "wsd", "warmup_steps": 1, "decay_steps": 2},
    ],
    "backend": [
        {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "nvme"},
        {"kind": "single"},
        {"kind": "ddp"},
        {"kind": "fsdp"},
    ],
}


def small_spec() -> Spec:
    """A valid spec that leaves most keys at their defaults."""
    return SMALL | {"data": {"kind": "synthetic", "sequence_length": 64}}


def valid_specs() -> list[Spec]:
    """What is mutated."""
    return [*maximal_specs(), small_spec()]


def maximal_specs() -> list[Spec]:
    """Valid specs with every key written out, which together have every kind of every section."""
    from scaling.spec import Spec as Validated

    found: list[Spec] = []
    for index in range(max(map(len, _VARIANTS.values()))):
        chosen = {section: kinds[index % len(kinds)] for section, kinds in _VARIANTS.items()}
        found.append(Validated.model_validate_json(json.dumps(SMALL | chosen)).to_json())
    for other in (_VLA, _EPISODES, _SFT, _DPO, _PPO, _FACTORY, _HUGGINGFACE, _HUGGINGFACE_VLA):
        found.append(Validated.model_validate_json(json.dumps(SMALL | other)).to_json())
    return found


# ---------------------------------------------------------------- places and typos


def containers(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All objects and lists in `value`, itself included, with their paths."""
    if isinstance(value, dict | list):
        yield path, value
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from containers(inner, (*path, key))


def key_places(spec: Spec) -> list[tuple[Path, str]]:
    """Each key of the spec as (path of its object, key), but for the free ones of arguments and of maps of names."""
    return [
        (path, key)
        for path, node in containers(spec)
        if isinstance(node, dict) and path[-1:] not in (("arguments",), ("names",))
        for key in node
    ]


def typos(key: str) -> list[str]:
    """What people type for `key`: a letter left out, doubled, swapped with the next, or mistaken for another."""
    found = [key[:i] + key[i + 1 :] for i in range(len(key))]
    found += [key[: i + 1] + key[i:] for i in range(len(key))]
    found += [key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)]
    found += [key[:i] + ("x" if letter != "x" else "y") + key[i + 1 :] for i, letter in enumerate(key)]
    return [typo for typo in dict.fromkeys(found) if typo not in ("", key)]


def renamed(spec: Spec, path: Path, key: str, name: str) -> Spec:
    """A copy of `spec` in which `key` of the object at `path` has another name and its old place."""
    spec = copy.deepcopy(spec)
    node: Any = spec
    for part in path:
        node = node[part]
    items = [(name if inner == key else inner, value) for inner, value in node.items()]
    node.clear()
    node.update(items)
    return spec


# ---------------------------------------------------------------- mutations of the value

_RAW = "@@raw:"
"""Begins a text that is written into the JSON as it is, without its quotes."""
_TWICE = "@@twice"
"""Ends a key that is written as a second one of the same name."""

_WRONG: list[Any] = [None, True, -1, 0, 1, 3, -2.5, 1e-9, 1e308, "", "auto", "x", "\n", "*", "a.b", [], [1], {}, [[]]]
_WRONG += [{"kind": 1}, {"kind": "ddp"}, "ünï", "\u202e", "../../x", "/etc/passwd", "a/b", "my_code:build", "a.b:c.d"]
_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, "0x10"]
_NUMBERS += ["01", ".5", "5.", "1_000", "--1", "1e", "-0", "1e-999"]
_KEYS = ["kind", "lr", "x", "ddp", "match", "", "a.b", "`", "0", "\0", "\x1b[31m", "é", "x" * 5000, "zero_optimization"]


def _drop(source: random.Random, spec: Spec) -> None:
    path, key = source.choice(key_places(spec))
    del _at(spec, path)[key]


def _rename(source: random.Random, spec: Spec) -> None:
    node, key = _object(source, spec)
    node[source.choice(_KEYS)] = node.pop(key)


def _typo(source: random.Random, spec: Spec) -> None:
    node, key = _object(source, spec)
    node[source.choice(typos(key) or ["x"])] = node.pop(key)


def _wrong_type(source: random.Random, spec: Spec) -> None:
    _set(source, spec, copy.deepcopy(source.choice(_WRONG)))


def _number(source: random.Random, spec: Spec) -> None:
    _set(source, spec, _RAW + source.choice(_NUMBERS))


def _negative(source: random.Random, spec: Spec) -> None:
    places = [(node, key) for node, key, value in _values(spec) if isinstance(value, int | float)]
    node, key = source.choice(places)
    node[key] = -node[key] or -1


def _huge_text(source: random.Random, spec: Spec) -> None:
    _set(source, spec, source.choice("x \u00e9*0") * source.choice([100, 4097, 200_000]))


def _moved(source: random.Random, spec: Spec) -> None:
    inner = source.choice([node for _, node in containers(spec)])
    _set(source, spec, copy.deepcopy(inner))


def _deep(source: random.Random, spec: Spec) -> None:
    depth = source.choice([10, 65, 100_000])
    opening, closing = source.choice([("[", "]"), ('{"a":', "}")])
    _set(source, spec, _RAW + opening * depth + "1" + closing * depth)


def _twice(source: random.Random, spec: Spec) -> None:
    node, key = _object(source, spec)
    node[key + _TWICE] = node[key] if source.random() < 0.5 else source.choice(_WRONG)


def _user_info(source: random.Random, spec: Spec) -> None:
    _set(source, spec, "https://someone:CANARY-in-a-url@example.org/x")


VALUE_MUTATIONS: dict[str, Callable[[random.Random, Spec], None]] = {
    "key dropped": _drop,
    "key renamed": _rename,
    "key misspelt": _typo,
    "wrong type": _wrong_type,
    "odd number": _number,
    "negative": _negative,
    "huge text": _huge_text,
    "part moved": _moved,
    "deep nesting": _deep,
    "duplicate key": _twice,
    "password in a URL": _user_info,
}


def _at(spec: Spec, path: Path) -> Any:
    node: Any = spec
    for part in path:
        node = node[part]
    return node


def _object(source: random.Random, spec: Spec) -> tuple[dict[str, Any], str]:
    path, key = source.choice(key_places(spec))
    return _at(spec, path), key


def _values(spec: Spec) -> list[tuple[Any, Any, Any]]:
    return [
        (node, key, value)
        for _, node in containers(spec)
        for key, value in (node.items() if isinstance(node, dict) else enumerate(node))
    ]


def _set(source: random.Random, spec: Spec, value: Any) -> None:
    node, key, _ = source.choice(_values(spec))
    node[key] = value


# ---------------------------------------------------------------- mutations of the text


def _cut(source: random.Random, text: bytes) -> bytes:
    return text[: source.randrange(len(text))]


def _inserted(what: list[bytes]) -> Callable[[random.Random, bytes], bytes]:
    def insert(source: random.Random, text: bytes) -> bytes:
        at = source.randrange(len(text))
        return text[:at] + source.choice(what) + text[at + source.randrange(2) :]

    return insert


TEXT_MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "text cut": _cut,
    "stray character": _inserted([b",", b'"', b"}", b"[", b"\\", b"'", b"//", b"\xc3\xa9", b"\x1b", b"NaN", b"\r"]),
    "NUL": _inserted([b"\0", b"\\u0000", b"\0" * 100]),
    "not UTF-8": _inserted([b"\xff", b"\xed\xa0\x80", b"\xc3", b"\\ud800"]),
    "byte order mark": lambda source, text: source.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xef\xbb"]) + text,
    "UTF-16": lambda source, text: text.decode().encode("utf-16"),
    "beyond the size limit": lambda source, text: text + b" " * 2**20,
}

_ASSIGNED = ["backend.kind", "backend", "data.kind", "param_groups.0.lr", "param_groups.9", "x.y", "schedule.kind"]
_ASSIGNED += ["objective.target", "objective.arguments.x", "name", "model.hidden_size", "data.train.0", ".."]
_ASSIGNED += ["$schema", "0.a"]
_GIVEN = ["ddp", "deepspeed", "text", "1", "null", "[]", "{}", '{"kind": "ddp"}', "cosine", "[", "-", "1" + "0" * 400]
_GIVEN += ["factory", "\udcff", "\0", "x" * 5000, "NaN", "../../x", "https://someone:CANARY-in-a-url@example.org", ""]


def mutant(seed: int, index: int, bases: list[Spec]) -> tuple[str, bytes, list[str]]:
    """What was done, the bytes of the spec's file, and the `--set`s: the same for the same seed and index."""
    source = random.Random(f"{seed}:{index}")
    names = [*VALUE_MUTATIONS, *TEXT_MUTATIONS, "--set"]
    name = names[index % len(names)]  # each as often as the others
    spec = copy.deepcopy(source.choice(bases))
    if name in VALUE_MUTATIONS:
        VALUE_MUTATIONS[name](source, spec)
        if source.random() < 0.3:
            VALUE_MUTATIONS[source.choice(list(VALUE_MUTATIONS))](source, spec)
    text = written(spec, indent=source.choice([None, 1]))
    if name in TEXT_MUTATIONS:
        text = TEXT_MUTATIONS[name](source, text)
    assignments: list[str] = []
    if name == "--set":
        pairs = [(source.choice(_ASSIGNED), source.choice(_GIVEN)) for _ in range(source.randint(1, 3))]
        assignments = ["=".join(pair) for pair in pairs]
    return name, text, assignments


def written(spec: Spec, indent: int | None = None) -> bytes:
    """`spec` as JSON, with the raw texts and the second keys that the mutations left in it."""
    text = json.dumps(spec, indent=indent, ensure_ascii=False)
    text = re.sub(rf'"{_RAW}((?:[^"\\]|\\.)*)"', lambda found: json.loads(f'"{found[1]}"'), text)
    return text.replace(_TWICE, "").encode("utf-8")
