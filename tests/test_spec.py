"""Reading specs: files, recipes, `--set`, defaults, the schema, and what it all costs to import."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from scaling.spec import Spec, load_spec, spec_schema
from scaling.spec.__main__ import validate
from scaling.spec.schema import made_schema
from scaling.spec.sections import DDP, FSDP, Cosine, DeepSpeed, SyntheticData, TokenData
from scaling.spec.source import recipes

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "scaling" / "spec" / "schema.json"


def recipe(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "scaling" / "recipes" / f"{name}.json").read_text())


def small() -> dict[str, Any]:
    """The shortest spec: everything with a default left out."""
    return {
        "name": "small",
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
        "optimizer": {"lr": 1e-3},
        "max_steps": 10,
    }


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(small()))
    return str(file)


@pytest.mark.parametrize("name", recipes())
def test_recipe(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    assert validate(name, []).startswith(f"{name}.json is valid: {spec.model.kind} of ")
    written = recipe(name)
    assert (ROOT / "scaling" / "recipes" / written["$schema"]).resolve() == SCHEMA
    jsonschema.validate(written, json.loads(SCHEMA.read_text()), cls=jsonschema.Draft202012Validator)


def test_there_are_recipes() -> None:
    assert {"gpt2-124m", "gpt-stdlib", "llama-8b"} <= set(recipes())


def test_recipes_are_the_models_that_they_are_named_after() -> None:
    assert "decoder of 124,475,904 parameters" in validate("gpt2-124m", [])
    assert "decoder of 8,030,261,248 parameters" in validate("llama-8b", [])  # as Meta's Llama-3-8B


def test_a_file_wins_over_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2-124m").write_text(json.dumps(small()))
    monkeypatch.chdir(tmp_path)
    assert load_spec("gpt2-124m").name == "small"
    (tmp_path / "llama-8b").mkdir()  # a folder does not
    assert load_spec("llama-8b").name == "llama-8b"


@pytest.mark.parametrize("name", recipes())
def test_a_spec_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    spec = load_spec(name)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec.to_json()))
    assert load_spec(str(file)) == spec
    jsonschema.validate(spec.to_json(), spec_schema())


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(small()).encode())
    assert load_spec(str(file)).name == "small"


def test_schema_file_is_current() -> None:
    assert json.loads(SCHEMA.read_text()) == made_schema(), (
        "scaling/spec/schema.json must be the schema of scaling/spec/sections, but is another; "
        "run: python -m scaling.spec schema > scaling/spec/schema.json"
    )


def test_schema_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(spec_schema())
    for name, section in {"Spec": spec_schema(), **spec_schema()["$defs"]}.items():
        assert section["description"], name
        assert section["additionalProperties"] is False, name
        for key, field in section["properties"].items():
            assert key == "kind" or "$ref" in field or "description" in field or "discriminator" in field, (name, key)


def test_set_values_are_json_or_else_text(path: str) -> None:
    spec = load_spec(path, ["max_steps=20", "optimizer.lr=1e-4", "compile=true", "precision=fp32", 'name="a"'])
    assert (spec.max_steps, spec.optimizer.lr, spec.compile, spec.precision, spec.name) == (20, 1e-4, True, "fp32", "a")
    assert load_spec(path, ["max_grad_norm=null"]).max_grad_norm is None
    assert load_spec(path, ['validation={"interval": 5, "batches": 1}']).validation is not None
    assert load_spec(path, ["optimizer.betas=[0.8, 0.9]"]).optimizer.betas == (0.8, 0.9)


def test_set_applies_in_order_and_validates_once(path: str) -> None:
    assert load_spec(path, ["max_steps=-1", "max_steps=20"]).max_steps == 20
    # Either alone contradicts the file; both together do not.
    spec = load_spec(path, ["data.sequence_length=256", "model.max_position_embeddings=256"])
    assert spec.data.sequence_length == 256


def test_set_starts_absent_sections_from_their_defaults(path: str) -> None:
    assert load_spec(path, ["schedule.warmup_steps=3"]).schedule.warmup_steps == 3
    assert load_spec(path, ["backend.cpu_offload=true"]).backend == FSDP(kind="fsdp", cpu_offload=True)
    assert load_spec(path, ["validation.interval=5", "validation.batches=2"]).validation is not None
    groups = load_spec(path, ["param_groups.0.lr=1e-4"]).param_groups
    assert [(group.name, group.lr) for group in groups] == [("all", 1e-4)]
    assert load_spec(path).param_groups[0].lr is None, "the default itself must stay as it is"


def test_set_reaches_into_lists(path: str) -> None:
    rules = 'param_groups=[{"name": "a", "match": ["embed*"]}]'
    groups = load_spec(
        path, [rules, 'param_groups.1={"name": "b", "match": ["*"]}', "param_groups.0.lr=0.5"]
    ).param_groups
    assert [(group.name, group.lr) for group in groups] == [("a", 0.5), ("b", None)]
    assert load_spec(path, [rules, "param_groups.0.match.1=*"]).param_groups[0].match == ["embed*", "*"]


def test_set_kind_drops_the_keys_of_the_other_kind() -> None:
    assert load_spec("gpt-stdlib", ["backend.kind=ddp"]).backend == DDP(kind="ddp")
    deepspeed = load_spec("gpt2-124m", ["backend.kind=deepspeed", "backend.zero_stage=3"]).backend
    assert deepspeed == DeepSpeed(kind="deepspeed", zero_stage=3)
    # In either order of the two flags.
    assert load_spec("gpt2-124m", ["backend.zero_stage=3", "backend.kind=deepspeed"]).backend == deepspeed
    data = load_spec("gpt-stdlib", ["data.kind=synthetic"]).data
    assert isinstance(data, SyntheticData) and data.sequence_length == 256
    data = load_spec("gpt-stdlib", ["data.kind=tokens"]).data
    assert isinstance(data, TokenData) and data.train == ["python-stdlib"]


def test_set_kind_works_where_the_section_is_absent(path: str) -> None:
    assert load_spec(path, ["backend.kind=ddp"]).backend == DDP(kind="ddp")
    assert load_spec(path, ["schedule.kind=cosine"]).schedule == Cosine(kind="cosine")


def test_to_json_spells_out_the_defaults(path: str) -> None:
    written = load_spec(path).to_json()
    backend = {"kind": "fsdp", "reshard_after_forward": True, "replicate": 1, "cpu_offload": False, "frozen": None}
    assert written["backend"] == backend
    assert written["optimizer"]["betas"] == [0.9, 0.95]
    assert Spec.model_validate_json(json.dumps(written)).to_json() == written


def test_validating_imports_no_heavy_package() -> None:
    program = (
        "import sys; sys.argv = ['spec', 'validate', 'gpt2-124m']\n"
        "from scaling.spec.__main__ import main; main()\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'rich', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_is_no_error() -> None:
    # 40 KB do not fit into the pipe's page-sized first read, so the command notices that `head` has gone.
    command = f"'{sys.executable}' -m scaling.spec schema | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 141)
