"""The gate: one spec, one curve. Real processes over gloo, through the user's own command."""

import json

import pytest
from processes import SPECS, python

from scaling.parity import Curve, agree, compare


def words(kind, objective, file):
    data = {"kind": kind, "train": [f"FOLDER/{file}"], "validation": 0, "sequence_length": 64, "cache": "FOLDER/cache"}
    return (f"data={json.dumps(data)}", f'objective={{"kind": "{objective}"}}')


SFT, DPO = words("chat", "sft", "chat.jsonl"), (*words("preference", "dpo", "pairs.jsonl"), "optimizer.lr=0.0003")
"""Made here: see `write_words`."""
GATES = {  # more sizes of each, and twice the steps: benchmarks/parity.py
    "GPT, accumulation 4": ("gpt-parity", "2", "single,fsdp,zero2,zero3", ()),
    "GPT, 4 ranks, the others": ("gpt-parity", "4", "single,fsdp,hsdp,zero2,zero3", ()),
    "GPT, accumulation 4, the others": ("gpt-parity", "4", "single,ddp,hsdp,zero1,zero2-offload", ()),
    "Llama, accumulation 1": ("llama-parity", "2", "single,ddp,fsdp,zero1,zero2,zero3", ()),
    "sequences that grow": (
        "gpt-parity", "2", "single,fsdp,zero2", ('data.sequence_curriculum={"min_length": 8, "steps": 8}',)
    ),
    "bf16": ("llama-parity", "2", "single,ddp,fsdp,zero1,zero2,zero3,zero2-offload", ("precision=bf16",)),
    "shards of unequal size": (
        "gpt-parity", "3", "single,ddp,fsdp,zero1,zero3",
        ("model.vocab_size=509", 'batch={"global_batch_size": 12, "gradient_accumulation_steps": 2}'),
    ),
    "vision, language and actions": ("vla-parity", "2", "single,fsdp,zero3", ()),
    "vision, language and actions, the others": ("vla-parity", "2", "single,ddp,hsdp,zero1,zero2,zero3-offload", ()),
    "flow matching in bf16, checkpointed": (
        "vla-parity", "2", "single,fsdp,zero1,zero3",
        ("precision=bf16", "objective.loss=flow_matching", "model.action.head=velocity",
         "activation_checkpointing=selective")
    ),
    "selective checkpointing": (
        "gpt-parity", "2", "single,fsdp,fsdp-offload,zero3,zero3-hpz,zero3-offload",
        ('activation_checkpointing="selective"',)
    ),
    "instructions": ("llama-parity", "2", "single,fsdp,zero3", SFT),
    "instructions, the others": ("gpt-parity", "1,2", "single,ddp,fsdp,zero1,zero2", SFT),
    "preferences": ("gpt-parity", "2", "single,fsdp,zero2", DPO),
    "preferences, the others": ("llama-parity", "1,2", "single,ddp,fsdp,zero1,zero3", DPO),
    "compiled": ("llama-parity", "2", "single,fsdp,zero3", ("compile=true",)),
    "compiled, the others": ("llama-parity", "2", "single,ddp,zero1,zero2", ("compile=true",)),
    "full checkpointing, plain loss, clipping off": (
        "gpt-parity", "2", "single,ddp,fsdp-keep,zero1-offload",
        ('activation_checkpointing="full"', "objective.cross_entropy=plain", "max_grad_norm=null"),
    ),
}  # fmt: skip


LONG = (
    *("sequences that grow", "Llama, accumulation 1", "bf16", "shards of unequal size", "selective checkpointing"),
    *("compiled", "flow matching in bf16, checkpointed", "full checkpointing, plain loss, clipping off"),
    *(name for name in GATES if name.endswith("the others")),
)


def write_words(folder):
    """Conversations and pairs of several lengths, from which something can be learnt in ten steps."""
    asked = [f"{'Is it so? ' * (index % 3)}{index}" for index in range(48)]
    chat = [{"instruction": question, "response": "yes " * (index % 4 + 1)} for index, question in enumerate(asked)]
    pairs = [{"prompt": question[-8:], "chosen": "yes", "rejected": "no"} for question in asked]
    for name, records in (("chat", chat), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))


@pytest.mark.parametrize("gate", [pytest.param(one, marks=pytest.mark.long) if one in LONG else one for one in GATES])
def test_curves_agree(gate, tmp_path):
    spec, world_sizes, backends, settings = GATES[gate]
    out = tmp_path / "parity.json"
    write_words(tmp_path)
    sets = [word for setting in settings for word in ("--set", setting.replace("FOLDER", str(tmp_path)))]
    command = ["-m", "scaling.parity", "--spec", str(SPECS / f"{spec}.json"), "--json", str(out), *sets]
    done = python(*command, "--backends", backends, "--world-sizes", world_sizes, "--steps", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["agree"]
    names, sizes = backends.split(","), world_sizes.split(",")
    assert len(report["curves"]) == 1 + (len(names) - 1) * len(sizes), "single runs once, the others at every size"
    first = report["curves"][0]["steps"]
    assert len(first) == 10 and first[-1]["loss"] < first[0]["loss"], "what is compared must be a run that learns"


@pytest.mark.long
def test_frozen_embeddings_before_blocks_that_are_gathered_whole():
    """No input of the first block wants a gradient: DeepSpeed then frees a leaf module before its backward pass."""
    frozen = 'param_groups=[{"name": "still", "match": ["embed*"], "freeze": true}, {"name": "rest", "match": ["*"]}]'
    command = ["-m", "scaling.parity", "--spec", str(SPECS / "llama-parity.json"), "--set", frozen]
    done = python(
        *(*command, "--set", "activation_checkpointing=selective"),
        *("--backends", "single,zero3", "--world-sizes", "2", "--steps", "3"),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_difference_is_found_and_the_command_fails(tmp_path):
    """The negative control: dropout draws other masks on other numbers of ranks."""
    command = ["-m", "scaling.parity", "--spec", str(SPECS / "gpt-parity.json"), "--set", "model.dropout=0.1"]
    done = python(*command, "--backends", "single,ddp", "--world-sizes", "1,2", "--steps", "3")
    assert done.returncode == 1
    assert "dropout is on" in done.stderr


def test_a_backend_that_cannot_run_is_a_row_and_not_the_end(tmp_path):
    out = tmp_path / "parity.json"
    command = ["-m", "scaling.parity", "--spec", str(SPECS / "llama-parity.json"), "--json", str(out)]
    batch = ("--set", 'batch={"global_batch_size": 9, "micro_batch_size": 3}')
    done = python(*command, *batch, "--backends", "single,ddp,fsdp", "--world-sizes", "1,2", "--steps", "2")
    assert done.returncode == 1
    outcomes = json.loads(out.read_text())["outcomes"]
    failed = [(row["backend"], row["world_size"]) for row in outcomes if row["error"]]
    assert failed == [("ddp", 2), ("fsdp", 2)]
    assert all("global_batch_size" in row["error"] for row in outcomes if row["error"])


def test_the_first_step_apart_is_named():
    def curve(name, *losses):
        return Curve(name, 1, tuple({"loss": loss, "grad_norm": 1.0, "lr": {"all": 1e-3}} for loss in losses))

    curves = [curve("single", 4.0, 3.0, 2.0), curve("ddp", 4.0, 3.0, 2.2), Curve("fsdp", 1, (), "ran out of memory")]
    outcomes = compare(curves, 1e-5)
    assert outcomes[1].first_step_apart == 3 and outcomes[1].loss == pytest.approx(0.1)
    assert outcomes[2].error == "ran out of memory"
    assert not agree(outcomes, 1e-5) and agree(outcomes[:1], 1e-5)


def test_a_norm_that_is_not_finite_in_one_run_alone_is_a_difference():
    def curve(name, *norms):
        return Curve(name, 1, tuple({"loss": 1.0, "grad_norm": norm, "lr": {"all": 1e-3}} for norm in norms))

    nan, inf = float("nan"), float("inf")
    outcomes = compare([curve("single", 1.0, 1.0), curve("ddp", 1.0, nan), curve("fsdp", nan, 1.0)], 1e-5)
    assert [outcome.grad_norm for outcome in outcomes] == [0.0, inf, inf]
    assert [outcome.first_step_apart for outcome in outcomes] == [None, 2, 1]
    assert not agree(outcomes, 1e-5)
    # fp16: both refused the same step; DeepSpeed calls the norm of such a step infinite, torch NaN.
    assert agree(compare([curve("single", nan, 1.0), curve("zero2", inf, 1.0)], 1e-5), 1e-5)


@pytest.mark.parametrize("steps", ["0", "-1", "many", "99999999999999"])
def test_steps_must_be_a_positive_number(steps):
    done = python("-m", "scaling.parity", "--spec", str(SPECS / "gpt-parity.json"), f"--steps={steps}")
    assert done.returncode == 2
    assert "--steps" in done.stderr and "Traceback" not in done.stderr
