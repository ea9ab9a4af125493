"""Each engine against the protocol, on real processes over gloo: what it starts from, trains, owns and refuses."""

import json

import pytest
from processes import SPECS, torchrun

from scaling.groups import resolve_groups
from scaling.inventory import parameters
from scaling.spec import load_spec

CASES = {
    ("gpt-parity", 1, "fp32"): "single,ddp,fsdp,zero1,zero2,zero3",
    ("gpt-parity", 2, "bf16"): "ddp,fsdp,hsdp,zero1,zero2,zero3,zero3-hpz,zero2-offload,zero3-offload",
    ("llama-parity", 3, "fp32"): "fsdp,zero1,zero3",
}
ENGINES = [(case, name) for case, names in CASES.items() for name in names.split(",")]


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """(case, backend) -> what tests/engine_worker.py saw; each case is launched once, when first asked for."""
    seen: dict = {}

    def look(case, name):
        if case not in seen:
            spec, world_size, precision = case
            out = tmp_path_factory.mktemp("engine") / "seen.jsonl"
            arguments = ("tests/engine_worker.py", str(out), str(SPECS / f"{spec}.json"), CASES[case])
            batch = f'batch={{"global_batch_size": {12 * world_size}, "micro_batch_size": 6}}'
            done = torchrun(world_size, *arguments, f"precision={precision}", batch)
            assert done.returncode == 0, done.stderr[-3000:]
            seen[case] = {row["backend"]: row for row in map(json.loads, out.read_text().splitlines())}
        return seen[case][name]

    return look


@pytest.mark.parametrize(
    ("case", "name"), ENGINES, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value))
)
def test_engine(observed, case, name):
    seen = observed(case, name)
    spec = load_spec(str(SPECS / f"{case[0]}.json"))
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model))
    trained = sorted(name for group in groups if not group.frozen for name in group.names)

    assert seen["complete"], "state() must cover every parameter"
    assert seen["starts_as_recipe"], "fp32 masters must start from the recipe's values, bit for bit"
    assert seen["trained"] == trained
    assert seen["moved"] == trained, "what is trained moves, what is frozen does not"
    assert seen["moments"] == trained
    assert seen["still_at_lr_0"], "the LR set in param_groups must be the one that is used"
    assert seen["nan_norm_is_not_finite"]
    assert seen["unchanged_by_nan"], "a NaN on one rank must change nothing on any"
    assert seen["goes_on_after_nan"]
