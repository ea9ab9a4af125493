"""A spec imports nothing, unless the command line names the package; then an objective of one's own trains."""

import json
import os
import subprocess
import sys

import pytest
from processes import ENVIRONMENT, ROOT, SPECS

from benchmarks.faults.mutations import maximal_specs
from scaling.errors import UserError
from scaling.imports import allowed_package, check_allowed, import_target
from scaling.objectives import build_objective
from scaling.spec.sections import Factory

TRAIN, SPEC = str(ROOT / "launch" / "train.py"), str(SPECS / "llama-parity.json")
FAST = ("--set", "max_steps=3", "--set", "schedule.warmup_steps=1", "--set", "profile.interval=1")
PLAIN = 'objective={"kind": "factory", "target": "own_objectives:plain", "arguments": {"scale": 1.0}}'


def run_in(folder, *command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def train(folder, *more):
    return run_in(ROOT / "tests", TRAIN, "--spec", SPEC, "--run-dir", str(folder), *FAST, *more)


def curve(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def test_an_objective_of_ones_own_trains_as_the_built_in_one(tmp_path):
    own = train(tmp_path / "own", "--allow-import", "own_objectives", "--set", PLAIN)
    assert own.returncode == 0, own.stderr
    for text in (own.stdout, (tmp_path / "own" / "train.log").read_text()):
        assert "importing own_objectives for own_objectives:plain" in text
    built_in = train(tmp_path / "built-in")
    assert built_in.returncode == 0, built_in.stderr
    for have, want in zip(curve(tmp_path / "own"), curve(tmp_path / "built-in"), strict=True):
        assert have == pytest.approx(want, rel=1e-5)


def corpus(target):
    """Specs and `--set`s with `target` wherever a text can stand, a factory in each section, and permissions."""
    factory = {"kind": "factory", "target": target, "arguments": {}}
    for spec in maximal_specs():
        for path, value in places(spec):
            yield changed(spec, path, factory), []
            if isinstance(value, str):
                yield changed(spec, path, target), []
                yield changed(spec, path, target.partition(":")[0]), []
                yield spec, [f"{'.'.join(map(str, path))}={target}"]
        yield {**spec, "objective": factory, "allow_import": [target.partition(".")[0]]}, []
        yield spec, [f"objective={json.dumps({**factory, 'allow_import': ['sentinel_package']})}"]
        yield spec, ["objective.kind=factory", f"objective.target={target}", "objective.arguments.allow_import=true"]


def places(value, path=()):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key), inner
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def changed(spec, path, value):
    spec = json.loads(json.dumps(spec))
    node = spec
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return spec


@pytest.mark.fault("S4")
@pytest.mark.fault("S6")
def test_no_spec_imports_anything_by_itself(tmp_path):
    package = tmp_path / "sentinel_package"
    package.mkdir()
    (package / "__init__.py").write_text("import pathlib\npathlib.Path('imported').touch()\n")
    (package / "losses.py").write_text("def build():\n    return lambda module, batch: None\n")
    cases = list(corpus("sentinel_package.losses:build"))
    assert len(cases) > 300
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    program = """
import json, sys
from pathlib import Path
from scaling.errors import UserError
from scaling.imports import import_target
from scaling.spec.__main__ import validate
from scaling.spec import load_spec
from scaling.train import resolve
valid = 0
for spec, assignments in json.loads(Path("cases.json").read_text()):
    Path("spec.json").write_text(json.dumps(spec))
    try:
        validate("spec.json", assignments)
        valid += 1
        resolve(load_spec("spec.json", assignments), 1)
    except UserError:
        pass
absent = not Path("imported").exists() and "sentinel_package" not in sys.modules
import_target("sentinel_package.losses:build", ["sentinel_package"])
print(json.dumps([valid, absent, Path("imported").exists()]))
"""
    done = run_in(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    valid, absent, control = json.loads(done.stdout)
    assert valid > 10 and absent and control


@pytest.mark.fault("S4")
def test_the_command_refuses_what_is_not_allowed(tmp_path):
    for more in ((), ("--allow-import", "own"), ("--allow-import", "own_objectives.plain")):
        done = train(tmp_path / "run", "--set", PLAIN, *more)
        assert done.returncode == 2 and not (tmp_path / "run").exists()
        assert "`objective.target` must be in a package that --allow-import names" in done.stderr
        assert "pass --allow-import own_objectives" in done.stderr and len(done.stderr.splitlines()) == 1
    done = train(tmp_path / "run", "--allow-import", "*")
    assert done.returncode == 2 and "must be a package" in done.stderr


@pytest.mark.fault("S6")
def test_a_checkpoint_permits_nothing(tmp_path):
    """A run that was allowed to import goes on only where the command line allows it again."""
    own, folder = ("--set", PLAIN), tmp_path / "run"
    assert train(folder, *own, "--allow-import", "own_objectives", "--stop-after", "2").returncode == 0
    assert list((folder / "checkpoints").glob("step-*"))
    for more in ((), ("--resume", str(folder / "checkpoints"))):
        done = train(folder, *own, *more)
        assert done.returncode == 2 and "`objective.target` must be in a package" in done.stderr
        assert "importing own_objectives" not in done.stdout + done.stderr
    assert train(folder, *own, "--allow-import", "own_objectives").returncode == 0


@pytest.mark.fault("S4")
def test_what_is_allowed_is_a_package_and_what_is_in_it():
    for target, allowed in (("a.b:f", ["a"]), ("a.b:f", ["a.b"]), ("a.b.c:f", ["x", "a.b"]), ("a:f", ["a"])):
        check_allowed(target, allowed)
    for target, allowed in (("a.b:f", []), ("ab:f", ["a"]), ("a.bc:f", ["a.b"]), ("a:f", ["a.b"]), ("x.a:f", ["a"])):
        with pytest.raises(UserError):
            check_allowed(target, allowed)
    assert allowed_package("a.b_1") == "a.b_1"
    for text in ("", "*", "a.*", "../a", "a..b", ".a", "a.", "1a", "a b", "a:b", "a" * 300):
        with pytest.raises(Exception, match="must be a package"):
            allowed_package(text)


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        ("own_objectivs:plain", {}, "there is no own_objectivs"),
        ("own_objectives.inner:plain", {}, "own_objectives.inner cannot"),
        ("own_objectives:plan", {}, "plan of own_objectives is not"),
        ("own_objectives:NUMBER", {}, "it is a int"),
        ("own_objectives:plain", {"sclae": 1}, "unexpected keyword argument 'sclae'"),
        ("own_objectives:crashing", {}, "missing a required argument"),
        ("own_objectives:no_function", {}, "must return a function"),
    ],
)
def test_what_is_wrong_with_a_target_is_told(target, arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT / "tests")
    spec = Factory(kind="factory", target=target, arguments=arguments)
    with pytest.raises(UserError, match=words) as caught:
        build_objective(spec, ["own_objectives", "own_objectivs"])
    assert "`objective." in str(caught.value)


def test_errors_of_the_imported_code_pass_through(tmp_path, monkeypatch):
    (tmp_path / "broken_own_code.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.getcwd())
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        import_target("broken_own_code:build", ["broken_own_code"])
