"""Specs that a user gets wrong, each through the real command: one short message that names the field and a remedy."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from scaling.spec import SpecError, load_spec
from scaling.spec.__main__ import validate

GOOD: dict[str, Any] = {
    "name": "job",
    "model": {
        "kind": "decoder",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "data": {"kind": "synthetic", "sequence_length": 64},
    "batch": {"global_batch_size": 8, "micro_batch_size": 1},
    "optimizer": {"kind": "adamw", "lr": 1e-3},
    "param_groups": [{"name": "embedding", "match": ["embed*"]}, {"name": "rest", "match": ["*"]}],
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "backend": {"kind": "fsdp"},
    "max_steps": 10,
    "validation": {"interval": 5, "batches": 1},
}
DEEPSPEED = {"kind": "deepspeed", "zero_stage": 2}
TEXT = {"kind": "text", "train": ["*.txt"], "sequence_length": 64}
ABSENT = object()


def spec_with(changes: dict[str, Any]) -> dict[str, Any]:
    spec = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, last = path.split("/")
        node: Any = spec
        for part in parents:
            node = node[int(part) if part.isdigit() else part]
        if value is ABSENT:
            del node[last]
        else:
            node[int(last) if last.isdigit() else last] = value
    return spec


def run(*arguments: str, folder: Path, given: bytes | None = None) -> subprocess.CompletedProcess[str]:
    # The environment of a plain shell: coverage and the like would be paid for in every one of many starts.
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "PYTHONPATH", "LANG")}
    command = [sys.executable, "-m", "scaling.spec", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, input=given, timeout=20, env=environment)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def check_refused(done: subprocess.CompletedProcess[str], *wanted: str, longest: int = 500) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for words in wanted:
        assert words in done.stderr, done.stderr
    assert all(len(line) <= longest for line in done.stderr.splitlines()), done.stderr


# What is changed in a good spec; the field that the message must name; words of its remedy.
WRONG_VALUES: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt key": ({"maxsteps": 10}, "`maxsteps`", "did you mean `max_steps`?"),
    "misspelt required key": ({"modle": GOOD["model"], "model": ABSENT}, "`modle`", "did you mean `model`?"),
    "misspelt model key": ({"model/hiden_size": 3}, "`model.hiden_size`", "did you mean `hidden_size`?"),
    "misspelt batch key": (
        {"batch/gradient_acumulation_steps": 8},
        "`batch.gradient_acumulation_steps`",
        "did you mean `gradient_accumulation_steps`?",
    ),
    "misspelt data key": ({"data/seqence_length": 3}, "`data.seqence_length`", "did you mean `sequence_length`?"),
    "misspelt group key": ({"param_groups/0/frezze": True}, "`param_groups.0.frezze`", "did you mean `freeze`?"),
    "misspelt schedule key": ({"schedule/warmup": 3}, "`schedule.warmup`", "did you mean `warmup_steps`?"),
    "DeepSpeed's name of a key": ({"gradient_clipping": 1.0}, "`gradient_clipping`", "did you mean `max_grad_norm`?"),
    "Hugging Face's name of a key": ({"optimizer/learning_rate": 1}, "`optimizer.learning_rate`", "did you mean `lr`?"),
    "key of another section": ({"lr": 1e-3}, "`lr`", "did you mean `optimizer.lr`?"),
    "key of another kind": ({"backend/zero_stage": 2}, "`backend.zero_stage`", 'use kind "deepspeed"'),
    "key like no other": ({"qqqq": 1}, "`qqqq`", "use one of $schema, name, seed"),
    "missing key": ({"name": ABSENT}, "`name`", "add it"),
    "missing section": ({"data": ABSENT}, "`data`", "add it"),
    "missing inner key": ({"model/vocab_size": ABSENT}, "`model.vocab_size`", "add it"),
    "missing kind": ({"backend": {"reshard_after_forward": True}}, "`backend.kind`", '"fsdp"'),
    "text for a number": ({"optimizer/lr": "1e-3"}, "`optimizer.lr`", "write 1e-3 without quotes"),
    "text for a count": (
        {"batch/global_batch_size": "many"},
        "`batch.global_batch_size`",
        'at least 1, "auto" or null',
    ),
    "fraction for a count": ({"max_steps": 10.5}, "`max_steps`", "round it"),
    "float for a count": ({"max_steps": 10.0}, "`max_steps`", "write 10"),
    "truth for a count": ({"max_steps": True}, "`max_steps`", "a whole number"),
    "number for a truth": ({"compile": 1}, "`compile`", "write true"),
    "word for a truth": ({"compile": "yes"}, "`compile`", "write true without quotes"),
    "null for a number": ({"optimizer/lr": None}, "`optimizer.lr`", "a number above 0"),
    "text for a list": ({"param_groups/0/match": "embed*"}, "`param_groups.0.match`", 'write ["embed*"]'),
    "number for a text": ({"name": 5}, "`name`", 'write "5"'),
    "list for a section": ({"batch": []}, "`batch`", "an object"),
    "negative steps": ({"max_steps": -1}, "`max_steps`", "raise it"),
    "zero micro batch": ({"batch/micro_batch_size": 0}, "`batch.micro_batch_size`", "raise it"),
    "dropout of one": ({"model/dropout": 1}, "`model.dropout`", "lower it"),
    "beta above one": ({"optimizer/betas": [0.9, 1.5]}, "`optimizer.betas.1`", "lower it"),
    "one beta": ({"optimizer/betas": [0.9]}, "`optimizer.betas`", "a list of 2 numbers"),
    "three betas": ({"optimizer/betas": [0.9, 0.95, 0.99]}, "`optimizer.betas`", "drop the key for the default"),
    "ZeRO stage 4": ({"backend": {**DEEPSPEED, "zero_stage": 4}}, "`backend.zero_stage`", "from 1 to 3"),
    "10**400 steps": ({"max_steps": 10**400}, "`max_steps`", "lower it"),
    "10**400 as LR": ({"optimizer/lr": 10**400}, "`optimizer.lr`", "lower it"),
    "frozen parts cut by ddp": (
        {"backend": {"kind": "ddp", "frozen": "shard"}},
        "`backend.frozen`",
        'set `backend` to {"kind": "fsdp"}',
    ),
    "frozen parts cut by ZeRO-2": (
        {"backend": {"kind": "deepspeed", "zero_stage": 2, "frozen": "shard"}},
        "`backend.frozen`",
        "drop it or use stage 3",
    ),
    "frozen parts of one process": ({"backend": {"kind": "single", "frozen": "shard"}}, "`backend.frozen`", "ddp"),
    "unknown policy for frozen parts": (
        {"backend": {"kind": "fsdp", "frozen": "replicated"}},
        "`backend.frozen`",
        'did you mean "replicate"?',
    ),
    "unknown backend": ({"backend": {"kind": "fdsp"}}, "`backend.kind`", 'did you mean "fsdp"?'),
    "kind in place of its section": ({"backend": "ddp"}, "`backend`", 'did you mean {"kind": "ddp"}?'),
    "unknown precision": ({"precision": "bfloat16"}, "`precision`", 'did you mean "bf16"?'),
    "unknown schedule": ({"schedule/kind": "cos"}, "`schedule.kind`", 'did you mean "cosine"?'),
    "name with a slash": ({"name": "../up"}, "`name`", 'did you mean "up"?'),
    "long name": ({"name": "x" * 5000}, "`name`", "shorten it"),
    "empty glob": ({"param_groups/0/match": [""]}, "`param_groups.0.match.0`", "not empty"),
    "no groups": ({"param_groups": []}, "`param_groups`", "add an entry"),
    "validation share of two": ({"data": {**TEXT, "validation": 2.0}}, "`data.validation`", "lower it"),
    "validation list of numbers": ({"data": {**TEXT, "validation": [3]}}, "`data.validation.0`", 'write "3"'),
    "two global batches": ({"batch/global_batch_tokens": 512}, "`batch.global_batch_tokens`", "drop one"),
    "two sizes open": ({"batch": {"micro_batch_size": 2}}, "`batch.global_batch_size`", "set one of them"),
    "sizes that contradict": ({"batch/gradient_accumulation_steps": 3}, "`batch.global_batch_size`", "the nearest"),
    "half a sequence": ({"batch": {"global_batch_tokens": 96, "micro_batch_size": 1}}, "global_batch_tokens`", "64"),
    "offloaded parameters at stage 2": (
        {"backend": {**DEEPSPEED, "offload_parameters": "cpu"}},
        "`backend.offload_parameters`",
        "use stage 3",
    ),
    "nvme without a path": (
        {"backend": {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme"}},
        "`backend.nvme_path`",
        "name a folder",
    ),
    "heads that do not divide": ({"model/hidden_size": 65}, "`model.hidden_size`", "use 64 or 68"),
    "key heads that do not divide": ({"model/num_key_value_heads": 3}, "`model.num_key_value_heads`", "1, 2, 4"),
    "sequence beyond the model": ({"data/sequence_length": 256}, "`data.sequence_length`", "change one of them"),
    "warm-up beyond the end": ({"schedule/warmup_steps": 11}, "`schedule.warmup_steps`", "train longer"),
    "no length": ({"max_steps": ABSENT}, "`max_steps`", "set max_steps"),
    "two lengths": ({"epochs": 1}, "`epochs`", "drop one"),
    "frozen group with an LR": (
        {"param_groups/0": {"name": "e", "match": ["embed*"], "freeze": True, "lr": 1e-3}},
        "`param_groups.0.lr`",
        "drop it",
    ),
    "two groups of one name": ({"param_groups/0/name": "rest"}, "`param_groups`", "rename one"),
    "glob that matches nothing": ({"param_groups/0/match": ["embd.*"]}, "`param_groups.0.match.0`", "'embed_tokens.*'"),
    "parameter in no group": ({"param_groups/1/match": ["layers.*"]}, "`param_groups`", "norm.weight"),
    "everything frozen": (
        {"param_groups": [{"name": "a", "match": ["*"], "freeze": True}]},
        "`param_groups`",
        "unfreeze",
    ),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_wrong_value(case: str, tmp_path: Path) -> None:
    changes, field, remedy = WRONG_VALUES[case]
    (tmp_path / "spec.json").write_text(json.dumps(spec_with(changes), indent=2))
    check_refused(run("validate", "spec.json", folder=tmp_path), "spec.json:", field, remedy)


# The file's bytes, and words of the message.
WRONG_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("spec.json: ", "is empty", "gpt2-124m")),
    "blank": (b" \n\t", ("is empty",)),
    "no object": (b"[1]", ("spec.json:1:1: ", "must be an object")),
    "null": (b"null", ("must be an object",)),
    "open brace": (b'{"name": "job"', ("spec.json:1:15: ", "close what is open")),
    "trailing comma": (b'{"name": "job",\n}', ("spec.json:2:1: ", "drop the comma")),
    "missing comma": (b'{"name": "job"\n "seed": 1}', ("spec.json:2:2: ", "`,` or `}`")),
    "missing colon": (b'{"name" "job"}', ("spec.json:1:9: ", "`:`")),
    "single quotes": (b"{'name': 1}", ("spec.json:1:2: ", "double quotes")),
    "comment": (b'{\n  // a comment\n  "name": "job"}', ("spec.json:2:3: ", "JSON has none")),
    "Python's truth": (b'{"compile": True}', ("`compile`", "write true")),
    "no quotes": (b'{"precision": bf16}', ("`precision`", 'write "bf16"')),
    "leading point": (b'{"seed": .5}', ("`seed`", "0.5")),
    "NaN": (b'{"optimizer": {"lr": NaN}}', ("spec.json:1:22: ", "`optimizer.lr`", "finite")),
    "minus infinity": (b'{"optimizer": {"lr": -Infinity}}', ("`optimizer.lr`", "finite")),
    "1e999": (b'{"optimizer": {"lr": 1e999}}', ("`optimizer.lr`", "lower it")),
    "5000 digits": (b'{"seed": ' + b"9" * 5000 + b"}", ("`seed`", "at most 1000 digits")),
    "1 MB of brackets": (b"[" * 2**20, ("spec.json:1:66: ", "at most 64 deep")),
    "1 MB of objects": (b'{"a":' * 200_000, ("at most 64 deep",)),
    "more than 1 MiB": (b" " * (2**20 + 1), ("at most 1048576 bytes",)),
    "control character": (b'{"name": "a\tb"}', ("spec.json:1:12: ", "`name`", "control character")),
    "open text": (b'{"name": "job}', ("`name`", "unterminated string")),
    "bad escape": (b'{"name": "\\x"}', ("`name`", "escape")),
    "half a surrogate pair": (b'{"name": "\\ud800"}', ("`name`", "surrogate")),
    "NUL in a text": (b'{"name": "a\\u0000b"}', ("`name`", "NUL")),
    "NUL in the file": (b'{"name":\x00"a"}', ("spec.json:1:9: ",)),
    "not UTF-8": (b'{"name":\n "\xff"}', ("spec.json:2: ", "save it as UTF-8")),
    "UTF-16": ('{"name": "job"}'.encode("utf-16"), ("save it as UTF-8",)),
    "two specs": (b"{}{}", ("spec.json:1:3: ", "drop the rest")),
    "duplicate key": (b'{"name": "a",\n "seed": 1,\n "name": "b"}', ("spec.json:3:2: `name`", "1:2", "drop one")),
    "1 MB value": (b'{"precision": "' + b"x" * 10**6 + b'"}', ("`precision`", "1000002 characters")),
    "1 MB key": (b'{"' + b"x" * 10**6 + b'": 1}', ("1000000 characters", "must be a key of the spec")),
    "100000 unknown keys": (
        b'{"a":1' + b"".join(b',"k%d":1' % i for i in range(90_000)) + b"}",
        ("and more problems",),
    ),
    "100000 duplicate keys": (b'{"a":1' + b',"a":1' * 100_000 + b"}", ("stand once", "and more problems")),
    "100000 list entries": (b'{"seed": [' + b"1," * 100_000 + b"1]}", ("`seed`", "300003 characters")),
    "terminal escapes": (b'{"\\u001b[31mred": "\\u001b[0m"}', ("\\x1b[31mred",)),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file(case: str, tmp_path: Path) -> None:
    content, wanted = WRONG_FILES[case]
    (tmp_path / "spec.json").write_bytes(content)
    done = run("validate", "spec.json", folder=tmp_path)
    check_refused(done, *wanted)
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) <= 41


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gpt.json").write_text("{}")
    for source, *wanted in (
        ("absent", "no such file", "gpt2-124m"),
        ("gtp.json", "no such file", "did you mean gpt.json"),
        ("gpt2-123m", "did you mean gpt2-124m"),
        ("nowhere/spec.json", "folder nowhere"),
        (".", "a folder", "name a file in it"),
        ("pipe", "a pipe", "pass -"),
        ("/dev/zero", "a device"),
        ("x" * 5000, "File name too long"),
    ):
        check_refused(run("validate", source, folder=tmp_path), *wanted)


def test_standard_input_is_checked_like_a_file(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    assert run("validate", "-", folder=tmp_path, given=good).returncode == 0
    check_refused(run("validate", "-", folder=tmp_path, given=good[:-1]), "<stdin>:1:", "close what is open")


def test_command_line(tmp_path: Path) -> None:
    check_refused(run("valdate", folder=tmp_path), "invalid choice: 'valdate'")
    check_refused(run("validate", folder=tmp_path), "SPEC")
    check_refused(run("validate", "a", "--sett", "b", folder=tmp_path), "--sett")
    assert "validate" in run(folder=tmp_path).stdout


WRONG_ASSIGNMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no value": (("max_steps",), ("`--set` must be A.B=VALUE",)),
    "no path": (("=3",), ("`--set` must be A.B=VALUE",)),
    "empty part": (("batch..x=3",), ("`--set` must be A.B=VALUE",)),
    "unknown key": (("batch.micro_batch_sise=2",), ("`batch.micro_batch_sise`", "did you mean `micro_batch_size`?")),
    "unknown section": (("optimiser.lr=1",), ("`optimiser`", "did you mean `optimizer`?")),
    "out of range": (("batch.micro_batch_size=0",), ("`batch.micro_batch_size`", "raise it")),
    "beyond a list": (("param_groups.5.lr=1",), ("`param_groups`", "0 to 2")),
    "into a number": (("max_steps.x=1",), ("`max_steps`", "set `max_steps` itself")),
    "broken JSON": (('param_groups=[{"name"',), ("`:`",)),
    "NaN": (("optimizer.lr=NaN",), ("`optimizer.lr`", '"NaN"')),
    "key of the old kind set by hand": (
        ("backend.cpu_offload=true", "backend.kind=ddp"),
        ("`backend.cpu_offload`", 'use kind "fsdp"'),
    ),
    "key missing from the new kind": (("backend.kind=deepspeed",), ("`backend.zero_stage`", "add it")),
    "what only the flag breaks": (("max_steps=1",), ("`schedule.warmup_steps`", "(1)")),
}


@pytest.mark.parametrize("case", WRONG_ASSIGNMENTS)
def test_wrong_assignment(case: str, tmp_path: Path) -> None:
    assignments, wanted = WRONG_ASSIGNMENTS[case]
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(UserError) as caught:
        validate(str(path), list(assignments))
    for words in wanted:
        assert words in str(caught.value)


def test_position_is_the_flag_for_what_a_flag_set(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(GOOD, indent=1))
    with pytest.raises(SpecError) as caught:
        load_spec(str(path), ["batch.micro_batch_size=0", "extra.x=1", "validation=null", "precision=fp12"])
    places = {problem.partition(": ")[0] for problem in caught.value.problems}
    assert places == {"--set batch.micro_batch_size=0", "--set extra.x=1", "--set precision=fp12"}


def test_all_problems_at_once_each_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    changes = {"max_steps": -1, "precision": "fp61", "batch/micro_batch_size": 1.5, "extra": 1, "model/bias": 0}
    path.write_text(json.dumps(spec_with({**changes, "optimizer/lr": ABSENT}), indent=1))
    with pytest.raises(SpecError) as caught:
        load_spec(str(path))
    lines = path.read_text().splitlines()
    assert len(caught.value.problems) == 6
    for problem in caught.value.problems:
        _, line, column, rest = problem.removeprefix(str(tmp_path)).split(":", 3)
        field = rest.split("`")[1].rpartition(".")[2]
        there = lines[int(line) - 1][int(column) - 1 :]
        if field == "lr":
            assert lines[int(line) - 1] == ' "optimizer": {' and there == "{"
        elif field == "extra":
            assert there.startswith('"extra"')
        else:
            assert f'"{field}": {there}' in lines[int(line) - 1]


def test_mutated_specs_are_valid_or_refused_with_a_message(tmp_path: Path) -> None:
    source = random.Random(20250)
    path = tmp_path / "spec.json"
    for _ in range(500):
        text = mutated(source)
        path.write_text(text, "utf-8", errors="surrogatepass")
        try:
            validate(str(path), assignments(source))
        except UserError as error:
            assert "; " in str(error) or "?" in str(error), (str(error), text)
            assert len(str(error)) < 30_000


VALUES = [None, True, -1, 0, 1, 3, 1e-9, 2.5, 10**19, 10**400, "", "auto", "x" * 9, "\n", "*", [], [1], {}, {"kind": 1}]
KEYS = [
    "kind",
    "lr",
    "x",
    "ddp",
    "match",
    "sequence_length",
    "",
    "a.b",
    "`",
    "zero_stage",
    "constrained-int",
    "0",
    "\0",
]


def mutated(source: random.Random) -> str:
    """A good spec with one to three changes of its values and keys, and sometimes of its characters."""
    spec = copy.deepcopy(GOOD)
    spec["data"] = source.choice([spec["data"], dict(TEXT)])
    spec["backend"] = dict(source.choice([spec["backend"], DEEPSPEED, {"kind": "single"}]))
    for _ in range(source.randint(1, 3)):
        node: Any = source.choice([n for n in containers(spec) if n] or [spec])
        key = source.choice(list(node) if isinstance(node, dict) else range(len(node)))
        match source.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[source.choice(KEYS)] = node.pop(key)
            case 2:
                node[key] = copy.deepcopy(source.choice(containers(spec)))
            case _:
                node[key] = copy.deepcopy(source.choice(VALUES))
    text = json.dumps(spec, indent=source.choice([None, 1]))
    if source.random() < 0.3:
        at = source.randrange(len(text))
        text = (
            text[:at]
            + source.choice(["", ",", '"', "}", "[", "NaN", "\\", "\ud800", "é", "1e999", "\ufeff"])
            + text[at + 1 :]
        )
    return text


def containers(value: Any) -> list[Any]:
    """All objects and lists in `value`, itself included."""
    if not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for one in inner for found in containers(one))]


def assignments(source: random.Random) -> list[str]:
    if source.random() < 0.7:
        return []
    paths = [
        "backend.kind",
        "backend",
        "data.kind",
        "param_groups.0.lr",
        "param_groups.9",
        "x.y.z",
        "schedule.kind",
        "0.a",
    ]
    values = ["ddp", "deepspeed", "text", "1", "null", "[]", "{}", '{"kind": "ddp"}', "cosine", "[", "-"]
    return [f"{source.choice(paths)}={source.choice(values)}" for _ in range(2)]
