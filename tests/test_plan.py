"""`python -m scaling.plan`: its JSON, its files, its messages; torch-free, and honest about what is not known."""

import json
import re
import subprocess
import sys

import pytest
from processes import ROOT, python
from rough import rough  # noqa: F401 - a fixture

from scaling.errors import run_command
from scaling.estimate.models import SIZES, bare_spec, decoder_of_config
from scaling.estimate.report import PARTS, PHASES
from scaling.inventory import parameters
from scaling.plan import main
from scaling.spec import load_spec
from scaling.spec.__main__ import validate
from scaling.spec.sections import Decoder

CANDIDATE = {
    *("backend", "activation_checkpointing", "micro_batch_size", "gradient_accumulation_steps", "global_batch_size"),
    *("tokens_per_step", "fits", "reason", "memory", "time", "set"),
}
TIME = {"step_seconds", "mean_step_seconds", "tokens_per_second_per_gpu", "mfu", "parts"}
MEMORY = {"peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "low_bytes", "high_bytes", "peak_phase"}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


def plan(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = run_command(lambda: main(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def planned(capsys, *arguments):
    """The JSON of a plan that succeeds."""
    code, out, err = plan(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# ---------------------------------------------------------------- real processes, real estimates


def test_the_command_answers_without_torch():
    code = (
        "import sys; from scaling.plan import main; code = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'numpy', 'deepspeed', 'rich') if name in sys.modules], code)"
    )
    arguments = ("--spec", "gpt-stdlib", "--gpus", "2xH100-80GB")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "[] 0"
    assert "gpt-stdlib on 2xH100-80GB" in done.stdout and "predicted" in done.stdout and "best: " in done.stdout


def test_a_spec_on_standard_input_that_cannot_fit_is_exit_code_3_and_still_json():
    command = [sys.executable, "-m", "scaling.plan", "--spec", "-", "--gpus", "1x4090", "--margin", ".99", "--json"]
    spec = (ROOT / "scaling/recipes/gpt2-124m.json").read_text()
    done = subprocess.run(command, input=spec, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert not any(candidate["fits"] for candidate in found["candidates"])
    assert done.stderr.startswith("`--gpus` must be a machine on which gpt2-124m fits") and " short " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_gpu_is_one_line():
    done = python("-m", "scaling.plan", "--spec", "gpt2-124m", "--gpus", "8xH101")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean H100" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- JSON


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("machine", ["1xH200", "8xH100-80GB", "2x8xA100-80GB"])
def test_the_json_has_the_schema_of_the_contract(capsys, machine):
    found = planned(capsys, "--spec", "gpt2-124m", "--gpus", machine)
    assert found["schema_version"] == 1
    assert found["model"]["parameters"] == found["model"]["trainable_parameters"] == 124_475_904
    assert 8e8 < found["model"]["flops_per_token"] < 9e8
    assert {"name", "nodes", "gpus_per_node", "usable_bytes"} <= set(found["hardware"])
    assert 0 < found["seconds"] < 10
    for candidate in [found["as_written"], *found["candidates"]]:
        assert set(candidate) == CANDIDATE
        assert set(candidate["memory"]) >= MEMORY | {"parts"} and set(candidate["memory"]["parts"]) >= set(PARTS)
        assert sum(candidate["memory"]["parts"].values()) == candidate["memory"]["peak_allocated_bytes"]
        assert set(candidate["time"]) == TIME
        assert set(candidate["time"]["parts"]) == set(PHASES)
        assert candidate["fits"] == (candidate["memory"]["high_bytes"] <= found["hardware"]["usable_bytes"])
    assert found["as_written"]["set"] == {} and found["as_written"]["micro_batch_size"] == 16
    assert {candidate["global_batch_size"] for candidate in found["candidates"]} == {512}


@pytest.mark.usefixtures("rough")
def test_the_set_of_a_candidate_leads_to_it(capsys):
    found = planned(capsys, "--spec", "llama-8b", "--gpus", "8xH100-80GB")
    for candidate in found["candidates"][::17]:
        flags = [f"{name}={json.dumps(value)}" for name, value in candidate["set"].items()]
        spec = load_spec("llama-8b", flags)
        assert spec.backend.model_dump() == candidate["backend"]
        assert spec.batch.micro_batch_size == candidate["micro_batch_size"]
        assert spec.activation_checkpointing == candidate["activation_checkpointing"]


@pytest.mark.usefixtures("rough")
def test_an_open_micro_batch_has_no_estimate_as_written(capsys):
    batch = 'batch={"global_batch_size": 64, "gradient_accumulation_steps": 2, "micro_batch_size": "auto"}'
    found = planned(capsys, "--spec", "gpt2-124m", "--gpus", "8xH100-80GB", "--set", batch)
    assert found["as_written"] is None and found["candidates"]


@pytest.mark.usefixtures("rough")
def test_what_is_not_known_is_null(capsys):
    found = planned(capsys, "--spec", "gpt2-124m", "--gpus", "8xT4")
    assert found["candidates"][0]["time"]["tokens_per_second_per_gpu"] is None
    code, out, _ = plan(capsys, "--spec", "gpt2-124m", "--gpus", "8xH100-PCIe-80GB")
    assert code == 0 and "usable memory of each GPU: n/a" in out


@pytest.mark.usefixtures("rough")
def test_json_into_a_file_leaves_the_table(capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = plan(capsys, "--spec", "gpt2-124m", "--gpus", "1xH200", "--json", str(path))
    assert code == 0 and "candidates in" in out and json.loads(path.read_text())["schema_version"] == 1


# ---------------------------------------------------------------- tables


@pytest.mark.usefixtures("rough")
def test_two_machines_are_compared(capsys):
    machines = ("--gpus", "8xH100-80GB", "--gpus", "4xH200")
    code, out, _ = plan(capsys, "--spec", "gpt2-124m", *machines)
    assert code == 0
    assert "gpt2-124m on 8xH100-80GB" in out and "gpt2-124m on 4xH200" in out
    table = out.partition("the best of each machine")[2]
    assert "8xH100-80GB" in table and "4xH200" in table
    assert [one["hardware"]["name"] for one in planned(capsys, "--spec", "gpt2-124m", *machines)] == [
        "H100-80GB",
        "H200",
    ]


@pytest.mark.usefixtures("rough")
def test_one_machine_of_two_is_enough(capsys):
    machines = ("--gpus", "8xH100-80GB", "--gpus", "1xT4")
    spec = ("--spec", "llama-8b", "--set", "backend.kind=single", "--margin", ".5")
    code, out, err = plan(capsys, *spec, *machines)
    assert code == 0 and "1xT4" in err and "nothing fits" in out


@pytest.mark.usefixtures("rough")
def test_the_best_comes_with_flags_and_the_ranking_is_cut(capsys):
    _, out, _ = plan(capsys, "--spec", "llama-8b", "--gpus", "8xH100-80GB", "--top", "3")
    rows = re.findall(r"^ *(\d+)  ", out, re.MULTILINE)
    assert rows == ["1", "2", "3"]
    assert re.search(r"^  --set ", out, re.MULTILINE) and re.search(r"P+.*\+", out) and "\x1b" not in out


@pytest.mark.usefixtures("rough")
def test_explain_tells_every_part(capsys):
    _, out, _ = plan(capsys, "--spec", "gpt2-124m", "--gpus", "8xH100-80GB", "--explain")
    for word in ("activations", "logits", "allocated", "at most", *PHASES):
        assert re.search(rf"^{word} ", out, re.MULTILINE), word


@pytest.mark.usefixtures("rough")
def test_costs_over_numbers_of_gpus(capsys):
    _, out, _ = plan(capsys, "--spec", "gpt2-124m", "--gpus", "2x8xH100-80GB", "--usd-per-gpu-hour", "2.5")
    table = out.partition("to 40,000 steps")[2]
    assert all(f"\n{name}-80GB  " in table for name in ("1xH100", "4xH100", "8xH100", "2x8xH100"))
    row = next(line for line in table.splitlines() if line.startswith("1xH100-80GB")).split()
    hours, dollars, energy = row[-3:]
    assert float(dollars.replace(",", "")) == pytest.approx(2.5 * float(hours.replace(",", "")), rel=0.02, abs=1)
    assert energy == "n/a"
    _, out, _ = plan(capsys, "--spec", "gpt2-124m", "--gpus", "8xH100-80GB", "--gpu-counts", "2,3,12")
    assert "3xH100-80GB  n/a: the global batch" in out and "12           n/a: no whole number of nodes" in out


@pytest.mark.usefixtures("rough")
def test_as_written_alone(capsys):
    code, out, _ = plan(capsys, "--spec", "gpt2-124m", "--gpus", "8xH100-80GB", "--as-written")
    assert code == 0 and "as written: fsdp" in out and "best" not in out
    code, _, err = plan(capsys, "--spec", "llama-8b", "--gpus", "1xT4", "--as-written", "--set", "backend.kind=single")
    assert code == 3 and "as written it does not fit on 1xT4" in err
    batch = 'batch={"global_batch_size": 64, "gradient_accumulation_steps": 2}'
    code, _, err = plan(capsys, "--spec", "gpt2-124m", "--gpus", "1xH200", "--as-written", "--set", batch)
    assert code == 2 and "auto" in err


# ---------------------------------------------------------------- files


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize(
    "changes", [[], ["--set", 'backend={"kind": "deepspeed", "zero_stage": 3, "sub_group_size": 4096}']]
)
def test_what_is_written_is_a_valid_spec_with_the_best_settings(capsys, tmp_path, changes):
    path = tmp_path / "tuned.json"
    machine = ("--gpus", "8xA100-40GB")
    best = planned(capsys, "--spec", "llama-8b", *machine, *changes, "--write", str(path))["candidates"][0]
    assert "is valid" in validate(str(path), [])
    spec = load_spec(str(path))
    assert spec.backend.model_dump() == best["backend"] and spec.batch.micro_batch_size == best["micro_batch_size"]
    again = planned(capsys, "--spec", str(path), *machine)
    assert again["as_written"]["memory"] == best["memory"] and again["candidates"][0]["backend"] == best["backend"]


@pytest.mark.usefixtures("rough")
def test_the_page_stands_alone_and_holds_every_candidate(capsys, tmp_path):
    path = tmp_path / "plan.html"
    machines = ("--gpus", "8xH100-80GB", "--gpus", "1xT4")
    found = planned(capsys, "--spec", "gpt2-124m", *machines, "--html", str(path))
    text = path.read_text()
    assert not re.search(r"https?:|//[a-z]+\.|<link|src=|@import", text)
    held = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert held["name"] == "gpt2-124m"
    assert [len(one["candidates"]) for one in held["machines"]] == [len(one["candidates"]) for one in found]
    assert held["machines"][0]["candidates"] == found[0]["candidates"]
    assert "prefers-color-scheme: dark" in text


@pytest.mark.usefixtures("rough")
def test_a_card_of_ones_own(capsys, tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"name": "mine", "memory_bytes": 48 * 2**30, "bf16_flops": 2e14}))
    found = planned(capsys, "--spec", "gpt2-124m", "--hardware", str(path), "--gpus", "2x4xMine")
    assert found["hardware"] | {"usable_bytes": 0} == {
        "name": "mine",
        "nodes": 2,
        "gpus_per_node": 4,
        "usable_bytes": 0,
        "memory_bytes": 48 * 2**30,
        "margin": 0.02,
        "measured_on": None,
        "is_cpu": False,
    }
    assert planned(capsys, "--spec", "gpt2-124m", "--hardware", str(path))["hardware"]["gpus_per_node"] == 1
    path.write_text(json.dumps({"name": "RTX box9"}))
    boxes = planned(capsys, "--spec", "gpt2-124m", "--hardware", str(path), "--gpus", "2xrtx box9")
    assert (boxes["hardware"]["name"], boxes["hardware"]["gpus_per_node"]) == ("RTX box9", 2)


# ---------------------------------------------------------------- a model without a spec


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "llama-8b", "qwen2.5-7b", "config"])
def test_a_bare_model_is_planned(capsys, tmp_path, name):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    model = str(path) if name == "config" else name
    sizes = ("--sequence-length", "512", "--global-batch-size", "64")
    found = planned(capsys, "--model", model, *sizes, "--gpus", "8xH200")
    assert found["as_written"] is None and found["candidates"][0]["global_batch_size"] == 64
    written = tmp_path / "bare.json"
    assert planned(capsys, "--model", model, *sizes, "--gpus", "8xH200", "--write", str(written))
    assert "is valid" in validate(str(written), [])


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt2", 0.1244),
        ("gpt2-xl", 1.558),
        ("llama2-7b", 6.738),
        ("llama2-13b", 13.016),
        ("llama2-70b", 68.977),
        ("llama3-8b", 8.030),
        ("llama3-70b", 70.554),
        ("llama3.1-405b", 405.85),
        ("mistral-7b", 7.242),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.544),
        ("qwen2.5-7b", 7.616),
        ("qwen3-8b", 8.191),
    ],
)
def test_known_sizes_have_the_parameters_that_are_told_of_them(name, billions):
    section, _ = decoder_of_config(SIZES[name], 512)
    assert sum(p.elements for p in parameters(Decoder(**section))) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen2"}, {"qkv_bias": True}),
        ({"model_type": "qwen3", "head_dim": 128}, {"qk_norm": True, "head_dim": 128}),
        ({"model_type": "mistral", "sliding_window": 4096, "num_key_value_heads": 8}, {"num_key_value_heads": 8}),
        (
            {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256},
            {"tie_word_embeddings": True},
        ),
        ({"attention_bias": True, "mlp_bias": True}, {"bias": True}),
    ],
)
def test_configs_of_each_family(changes, expected):
    section, notes = decoder_of_config(LLAMA | changes, 4096)
    assert expected.items() <= Decoder(**section).model_dump().items()
    assert bool(notes) == (changes.get("model_type") == "gemma")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"attention_bias": True}, "biases"),
        ({"num_local_experts": 8}, "experts"),
        ({"hidden_act": "relu"}, "relu"),
        ({"model_type": "mistral", "sliding_window": 1024}, "sliding window"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"model_type": ["llama"]}, "model_type is"),
    ],
)
def test_configs_that_the_decoder_cannot_say_are_refused(capsys, tmp_path, changes, word):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | changes))
    sizes = ("--sequence-length", "4096", "--global-batch-size", "8")
    code, out, err = plan(capsys, "--model", str(path), *sizes, "--gpus", "8xH200")
    assert (code, out) == (2, "") and "`--model` must be" in err and word in err and "Traceback" not in err


@pytest.mark.parametrize(
    "changes",
    [{"rms_norm_eps": "small"}, {"hidden_size": -1}, {"num_attention_heads": 7}, {"num_key_value_heads": "all"}, {}],
)
def test_configs_with_wrong_values_are_one_message(capsys, tmp_path, changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | changes) if changes else "[1]")
    sizes = ("--sequence-length", "4096", "--global-batch-size", "8")
    code, out, err = plan(capsys, "--model", str(path), *sizes, "--gpus", "8xH200")
    assert (code, out) == (2, "") and "must be" in err and "Traceback" not in err


def test_names_of_runs_are_names(tmp_path):
    folder = tmp_path / "my model!"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert bare_spec(str(folder / "config.json"), 8, 8)[0] == bare_spec(str(folder), 8, 8)[0]
    assert bare_spec(str(folder), 8, 8)[0]["name"] == "my-model-"
    assert bare_spec("llama3.1-405b", 8, 8)[0]["name"] == "llama3.1-405b"


# ---------------------------------------------------------------- mistakes

SPEC = ("--spec", "gpt2-124m")
ONE = ("--gpus", "1xH200")
BARE = ("--model", "gpt2", "--sequence-length", "512", "--global-batch-size", "8")


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((*SPEC,), "`--gpus` must be given"),
        (ONE, "exactly one of `--spec` and `--model`"),
        ((*SPEC, *BARE, *ONE), "exactly one of `--spec` and `--model`"),
        ((*SPEC, *ONE, "--sequence-length", "8"), "must come with `--model`"),
        (("--model", "gpt2", *ONE), "must come with `--sequence-length N`"),
        (("--model", "gpt5", *BARE[2:], *ONE), "did you mean gpt2"),
        (("--model", "none.json", *BARE[2:], *ONE), "config.json that can be read"),
        ((*SPEC, "--gpus", "0xH200"), "at least 1"),
        ((*SPEC, "--gpus", "H200"), "did you mean"),
        ((*SPEC, "--gpus", "7xH200"), "`batch.global_batch_tokens` must be"),
        ((*SPEC, *ONE, "--set", "model.num_attention_heads=7"), "multiple of num_attention_heads (7)"),
        ((*SPEC, *ONE, "--set", "model.heads=7"), "`model.heads`"),
        ((*BARE, *ONE, "--set", "data.sequence_length=5000"), "max_position_embeddings"),
        ((*SPEC, *ONE, "--margin", "1"), "share from 0"),
        ((*SPEC, *ONE, "--margin", "nan"), "share from 0"),
        ((*SPEC, *ONE, "--top", "0"), "whole number"),
        ((*SPEC, *ONE, "--usd-per-gpu-hour", "-2"), "--usd-per-gpu-hour"),
        ((*SPEC, *ONE, *ONE, "--write", "x.json"), "one `--gpus`"),
        ((*SPEC, *ONE, "--hardware", "none.json"), "`--hardware` must name"),
        ((*SPEC, *ONE, "--html", "/nowhere/plan.html"), "`--html` must be a file that can be written"),
        (("--spec", "gpt3", *ONE), "no such file or recipe"),
    ],
)
def test_mistakes_are_exit_code_2_and_one_message(capsys, arguments, word):
    code, _, err = plan(capsys, *arguments)
    assert code == 2 and word in err and "Traceback" not in err, err


@pytest.mark.usefixtures("rough")
def test_nothing_fits_is_exit_code_3_after_the_table(capsys):
    impossible = ("--spec", "llama-8b", "--gpus", "1xT4", "--set", "backend.kind=single", "--margin", ".9")
    code, out, err = plan(capsys, *impossible)
    assert code == 3 and "0 fit" in out and err.startswith("`--gpus` must be a machine on which llama-8b fits")
    code, out, err = plan(capsys, *impossible, "--json")
    assert code == 3 and json.loads(out)["candidates"] and len(err.splitlines()) == 1


def test_the_readme_shows_what_is_printed(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin = "$ python -m scaling.plan "
    command, *shown = readme[readme.index(begin) :].partition("\n```")[0].splitlines()
    _, out, _ = plan(capsys, *command.removeprefix(begin).split())
    printed = [line.rstrip() for line in out.splitlines()]
    assert len(shown) > 4 and [line for line in shown if line != "…" and line not in printed] == []
