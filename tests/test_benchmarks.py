"""The runner of benchmarks, comparisons of its results, their page, the suite for one GPU, scale on paper."""

import copy
import importlib
import json
import os
import time

import pytest
from processes import ROOT

from benchmarks import cell as one
from benchmarks import gpu_memory, gpu_suite, results_beside, results_page, scale
from benchmarks.compare import compare
from benchmarks.compare import main as compare_main
from benchmarks.largest import largest, search
from benchmarks.machine import Device, Others, ran_on
from benchmarks.matrix import MATRIX, Cell, cells, load_matrix
from benchmarks.run import KIND, main, noise, plan, summary
from scaling.errors import UserError, run_command
from scaling.inventory import parameters
from scaling.plan import main as plan_main
from scaling.spec import load_spec
from scaling.spec.sections import Decoder

WEAK = 'batch={"micro_batch_size": 1, "gradient_accumulation_steps": 2}'


# ---------------------------------------------------------------- the matrix


@pytest.mark.parametrize("path", [MATRIX, gpu_suite.MATRIX])
def test_every_cell_of_the_matrices_resolves(path):
    """Or is refused for its number of ranks alone."""
    for kind, entries in load_matrix(path).items():
        names = []
        for cell in cells(entries, (1, 4, 8)):
            names.append(cell.name)
            job = one.resolved(cell)
            assert job.plan.world_size == cell.ranks and kind in ("gpu", "cpu")
        assert names and len(set(names)) == len(names), "files are compared by name"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must hold"),
        ("{", "cannot be read"),
        ('{"cpu": [{"spec": "gpt2-tiny"}]}', "must have spec and backends"),
        ('{"cpu": [{"spec": "gpt2-tiny", "backends": ["zero4"]}]}', "'zero4'"),
        ('{"cpu": [{"spec": "gpt2-tiny", "backends": ["ddp"], "launcher": "mpirun"}]}', "'mpirun'"),
    ],
)
def test_a_wrong_matrix_is_refused(tmp_path, text, said):
    path = tmp_path / "matrix.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_matrix(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "1,x"], "numbers of GPUs"),
        (["--gpus", "1", "--steps", "3"], "`--steps`"),
        (["--gpus", "1", "--beside", "/nowhere"], "together"),
        (["--gpus", "1", "--beside", "/nowhere", "--beside-out", "x.json"], "no launch/train.py"),
        (["--gpus", "1", "--out", "/nowhere/x.json"], "folder that exists"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, words, said):
    assert run_command(lambda: main(words)) == 2
    assert said in capsys.readouterr().err


def test_what_the_machine_lacks_is_skipped_rehearsed_or_refused():
    entries = [{"spec": "gpt2-tiny", "backends": ["fsdp"], "options": {"weak": [WEAK], "strong": []}}]
    two = Device("gpu", "NVIDIA H200", 2)
    rows = [row for _, row in plan(entries, (1, 8, 3), "", two, False)]
    assert [row.get("status") for row in rows] == [None, "skipped", "skipped", None, "skipped", "refused"]
    assert rows[1]["reason"] == "this machine has 2 of 8 GPUs" and "global_batch" in rows[-1]["reason"]
    filled = [row for _, row in plan(entries, (1, 8, 3), "", two, True)]
    assert [row.get("status") for row in filled] == [None] * 5 + ["refused"]
    assert [row["ran_on"]["rehearsed"] for row in filled[:3]] == [False, True, True]


def test_a_row_says_what_it_ran_on():
    cpu, gpu = Device("cpu", "EPYC", 4), Device("gpu", "NVIDIA H200", 8)
    assert ran_on(cpu, 2, rehearsed=False)["words"] == "2 CPU ranks (EPYC, 4 cores), no GPU"
    assert ran_on(gpu, 2, rehearsed=False)["words"] == "2 x NVIDIA H200"
    assert ran_on(gpu, 8, rehearsed=True)["words"] == "rehearsed: rank 0 of 8 alone on one NVIDIA H200"
    assert "no GPU" in ran_on(cpu, 8, rehearsed=True)["words"]


def test_the_whole_recipe_is_the_same_job_to_plan_and_benchmark(capsys):
    entries = [{"spec": "gpt2-124m", "backends": ["fsdp"]}]
    row = one.facts(one.resolved(next(cells(entries, (8,)))))
    assert plan_main(["--spec", "gpt2-124m", "--gpus", "8xH100-80GB", "--as-written", "--json", "-"]) == 0
    planned = json.loads(capsys.readouterr().out)
    written = planned["as_written"]
    assert (row["tokens_per_step"], row["global_batch_size"]) == (524_288, 512)
    assert {name: written[name] for name in row if name in written} == {
        name: row[name] for name in row if name in written
    }
    assert row["flops_per_token"] == planned["model"]["flops_per_token"]


def test_a_pair_counts_attention_within_its_responses(capsys):
    """The planner's FLOPs of a preference are the run's: two sequences, each of which sees itself alone."""
    assert plan_main(["--spec", "minimind-dpo", "--gpus", "8xH100-80GB", "--as-written", "--json", "-"]) == 0
    planned = json.loads(capsys.readouterr().out)["model"]["flops_per_token"]
    assert planned == one.resolved(Cell("minimind-dpo", "ddp", "", 8, ())).flops_per_token


# ---------------------------------------------------------------- results that were made up


def a_run(speed, *, repeat=0, memory=1000, status="ok", busy=False):
    """A run as `benchmarks.cell.measure` tells it."""
    if status != "ok":
        return {"repeat": repeat, "status": status, "reason": "so it ended"}
    step = {"median": 100 / speed, "low": 99 / speed, "high": 101 / speed}
    return {
        "repeat": repeat,
        "status": "ok",
        "tokens_per_second": speed,
        "tokens_per_second_per_device": speed / 2,
        "step_seconds": step,
        "mfu": None,
        "joules_per_million_tokens": None,
        "memory": {"peak_allocated_bytes": memory, "host_rss_bytes": None},
        "predicted": {"memory": {"peak_allocated_bytes": 1000}},
        "others_cores": 1.5 if busy else 0.0,
        "busy": busy,
    }


def a_result(speeds, *, session="s", kind="cpu", name="m ddp x2", rehearsed=False, **more):
    """A result of one row that ran once for each speed; a speed of None is a run out of memory."""
    runs = [
        a_run(speed or 1, repeat=repeat, status="ok" if speed else "out of memory", **more)
        for repeat, speed in enumerate(speeds)
    ]
    here = Device(kind, "EPYC" if kind == "cpu" else "NVIDIA H200", 2)
    row = {"name": name, "ran_on": ran_on(here, 2, rehearsed=rehearsed), "world_size": 2, "runs": runs}
    row |= {"global_batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "tokens_per_step": 800}
    document = {
        "kind": KIND,
        "session": session,
        "began": "2026-01-01T00:00:00Z",
        "machine": {"kind": kind, "device": here.name, "count": 2, "before": {"others_cores": 0.0, "gpus": []}},
        "environment": {"commit": "c" * 40, "changed_since": False, "versions": {"torch": "2", "deepspeed": "0"}},
        "asked": {"repeats": len(speeds), "steps": 30, "warm_up": 5},
        "rows": [{**row, **summary(row)}],
    }
    return {**document, "noise": noise(document)}


def verdicts(base, new):
    return {verdict.quantity: verdict.verdict for verdict in compare(base, new)}


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        ([100, 101, 100], [97, 98, 97], "slower"),
        ([100, 101, 100], [99, 100, 99], "same"),
        ([100, 101, 100], [104, 105, 104], "faster"),
        # The machine became slower meanwhile: the pairs do not care.
        ([100, 80, 60], [97, 77.6, 58.2], "slower"),
        # One pair of three says so, and the others do not.
        ([100, 100, 100], [97, 103, 90], "cannot tell"),
        ([100], [97], "cannot tell"),
        ([100], [85], "slower"),
    ],
)
def test_pairs_of_runs(base, new, verdict):
    assert verdicts(a_result(base), a_result(new)) == {"speed": verdict, "memory": "same"}


def test_without_pairs_more_is_tolerated():
    base, new = [100, 101, 100, 100], [97, 98, 97, 97]
    assert verdicts(a_result(base, session="a"), a_result(new, session="b"))["speed"] == "same"
    assert verdicts(a_result(base, session="a"), a_result([90, 91, 90, 91], session="b"))["speed"] == "slower"
    # What one session lost from one run to the next, another may.
    assert verdicts(a_result([100, 70, 60], session="a"), a_result([90, 66, 55], session="b"))["speed"] == "cannot tell"


def test_memory_and_failures_are_compared_too():
    base = a_result([100, 100, 100])
    assert verdicts(base, a_result([100, 100, 100], memory=1010))["memory"] == "larger"
    assert verdicts(base, a_result([100, 100, 100], memory=1001))["memory"] == "same"
    assert verdicts(base, a_result([None])) == {"": "no longer runs"}
    assert verdicts(a_result([None]), base) == {"": "runs now"}
    assert verdicts(base, a_result([1], name="another")) == {"": "only in the new file"}


def test_what_is_not_alike_is_not_compared():
    base = a_result([100, 100, 100])
    for other in (a_result([10, 10, 10], kind="gpu"), a_result([10, 10, 10], rehearsed=True)):
        assert verdicts(base, other)[""].startswith("not comparable")
    larger = copy.deepcopy(base)
    larger["rows"][0]["micro_batch_size"] = 4
    assert verdicts(base, larger) == {"": "not comparable: micro_batch_size"}


def test_a_regression_has_exit_code_1(tmp_path, capsys):
    paths = [tmp_path / name for name in ("base.json", "same.json", "slow.json", "none.json")]
    for path, speeds in zip(paths, ([100, 101, 100], [100, 101, 100], [90, 91, 90]), strict=False):
        path.write_text(json.dumps(a_result(speeds)))
    paths[3].write_text("{}")
    codes = [run_command(lambda path=path: compare_main([str(paths[0]), str(path)])) for path in paths[1:]]
    assert codes == [0, 1, 2]
    printed = capsys.readouterr()
    assert "slower" in printed.out and "none.json is none" in printed.err


def test_a_noisy_machine_is_told():
    assert noise(a_result([100, 101, 100])) == []
    told = noise(a_result([100, 90, 100], busy=True))
    assert any("others kept cores busy" in one for one in told) and any("at worst 10.0 %" in one for one in told)
    taken = a_result([100, 101, 100], kind="gpu")
    taken["machine"]["before"]["gpus"] = [{"busy": 0.0, "taken_mib": 4.0}, {"busy": 0.9, "taken_mib": 4.0}]
    assert noise(taken) == ["before the first run others were at work on 1 of 2 GPUs"]
    assert noise(a_result([100])) == ["rows of fewer than three runs say little of how steady they are"]


def test_others_at_work_are_seen():
    """A process that nobody has waited for counts as others'; what this one does itself does not."""
    others = Others()
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass
    quiet = others.cores()
    assert quiet is not None and quiet < (os.cpu_count() or 1), "its own work is taken out"


def test_the_page_keeps_cpu_and_gpu_apart(tmp_path, capsys):
    part = {"cpu": a_result([100, 101, 100]), "old": a_result([None])}
    page = results_page.page(list(part.items()))
    gpus, rest = page.split("## Measured on a CPU")
    cpu, rehearsed = rest.split("## Rehearsed")
    assert "Not yet measured on a GPU." in gpus and "no GPU" in cpu and "2 CPU ranks" in cpu
    assert "| m ddp x2 |" not in gpus + rehearsed.split("## What did not run")[0]
    assert "| old | m ddp x2 | out of memory | so it ended |" in rehearsed
    real = results_page.page([("gpu", a_result([100, 101, 100], kind="gpu"))])
    assert "2 x NVIDIA H200" in real.split("## Measured on a CPU")[0] and "None." in real
    (tmp_path / "one.json").write_text(json.dumps(part["cpu"]))
    (tmp_path / "two.json").write_text("[]")
    out = tmp_path / "RESULTS.md"
    assert results_page.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    assert "2 CPU ranks (EPYC, 2 cores), no GPU" in out.read_text()
    assert run_command(lambda: results_page.main(["--results", str(ROOT / "docs"), "--out", str(out)])) == 2


def test_the_page_says_which_aims_beside_others_are_reached(tmp_path):
    def row(peer, ratio, mib):
        found = {"peer": peer, "why_not": None, "tokens_per_second": 100 * ratio, "turns": [1, 2], "losses_apart": 1e-6}
        ratios = dict.fromkeys(("median", "low", "high"), ratio)
        found |= {"of_ours": ratios, "cpu_of_ours": ratios, "start_seconds": 2.0, "lines": 9}
        return found | {"peak_bytes": {"resident": mib * 2**20}}

    rows = [row("ours", 1.0, 500), row("plain", 1.02, 400), row("trainer", 0.9, 700), row("fabric", 0.94, 450)]
    rows.append({"peer": "torchtitan", "why_not": "it trains on GPUs alone"})
    job = {"shape": "m", "ranks": 2, "device": "cpu", "tokens_per_step": 512, "same_losses": True, "rows": rows}
    where = {"versions": {"torch": "2"}, "commit": None, "device": "cpu", "cores": 2}
    (tmp_path / "peers.json").write_text(json.dumps({"environment": where, "jobs": [job]}))
    (tmp_path / "other.json").write_text(json.dumps({"environment": where}))
    found = list(results_beside.sections(list(results_beside.documents(tmp_path))))
    assert "peers.json: cpu, 2 cores, no GPU; commit unknown; torch 2." in found
    assert "| torchtitan | did not run: it trains on GPUs alone | | | | | |" in found
    verdicts = [line.rpartition(": ")[2] for line in found if line.startswith("- ")]
    assert verdicts == ["**missed**.", "reached.", "**missed**."]
    job["same_losses"] = False
    (tmp_path / "peers.json").write_text(json.dumps({"environment": where, "jobs": [job]}))
    assert any(
        "not the same work" in line for line in results_beside.sections(list(results_beside.documents(tmp_path)))
    )


def test_a_rehearsal_has_no_speed_on_the_page():
    row = a_result([100])["rows"][0]
    row |= {"ran_on": ran_on(Device("gpu", "NVIDIA H200", 1), 8, rehearsed=True), "tokens_per_second": None}
    row |= {"compute_seconds": 0.5, "predicted_communication_seconds": 0.1, "compute_only_mfu": 0.4}
    page = results_page.page([("r", {**a_result([100], kind="gpu"), "rows": [row]})])
    assert "Not yet measured on a GPU." in page
    assert "rehearsed: rank 0 of 8 alone on one NVIDIA H200" in page and "| 0.5 s | 0.1 s | 40.0 % |" in page


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        ({"code": 3, "reason": "it does not fit"}, "out of memory"),
        ({"code": 4, "reason": "NaN"}, "failed"),
        ({}, "failed"),
    ],
)
def test_how_a_run_failed_is_kept(tmp_path, ended, status):
    (tmp_path / "exit.json").write_text(json.dumps(ended))
    log = tmp_path / "log"
    log.write_text("one\ntwo\n")
    found = one._failure(tmp_path, 1, log, 5)
    assert found["status"] == status and found["reason"] == ended.get("reason", "exit code 1: one / two")
    assert "longer than 5 s" in one._failure(tmp_path, None, log, 5)["reason"]


# ---------------------------------------------------------------- the suite for one GPU


def test_the_suite_goes_on_where_it_was(tmp_path):
    """Commands that copy a file; the last one waits for a pipe that nobody writes to, until its time is over."""
    (tmp_path / gpu_suite.STATES).mkdir()
    (tmp_path / "in").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    found = [
        gpu_suite.Cell(name, "", ("json.tool", str(tmp_path / source), str(tmp_path / name)), name, limit)
        for name, source, limit in (("a", "in", 60), ("b", "in", 60), ("c", "nowhere", 60), ("d", "pipe", 1))
    ]
    first = gpu_suite.run_cells(found, tmp_path, 600)
    assert [state["status"] for state in first] == ["done", "done", "failed", "timed out"]
    assert "nowhere" in first[2]["reason"], "json.tool says so, and has the exit code of a bar that was missed"
    (tmp_path / "a").write_text("of the first call")
    (tmp_path / "b").unlink()
    again = gpu_suite.run_cells(found, tmp_path, 600)
    assert [state["status"] for state in again] == ["done", "done", "failed", "timed out"]
    assert (tmp_path / "a").read_text() == "of the first call" and (tmp_path / "b").exists()
    late = gpu_suite.run_cells(found, tmp_path, 1)
    assert [state["status"] for state in late] == ["done", "done", "left", "left"], "no time to begin anything"


@pytest.mark.parametrize("tiny", [True, False])
def test_every_command_line_of_the_suite_is_understood(tmp_path, tiny):
    (tmp_path / "memory-x.json").write_text("{}")
    found = list(gpu_suite.cells(tmp_path, tiny=tiny))
    assert len({cell.name for cell in found}) == len(found)
    rows = {cell.name for cell in cells(load_matrix(gpu_suite.MATRIX)["gpu"], (1, 8))}
    for cell in found:
        name, *words = gpu_suite._with_files(cell, tmp_path)
        name += ".__main__" if (ROOT / name.replace(".", "/")).is_dir() else ""
        options = importlib.import_module(name)._parser().parse_args(words)  # exits where it does not understand
        assert str(tmp_path / cell.out) in words
        if name == "benchmarks.calibration.__main__":
            assert options.add == [tmp_path / "memory-x.json"]
        if name == "benchmarks.run" and options.only:
            assert options.only in rows, cell
        if name == "benchmarks.gpu_memory":
            assert list(gpu_memory.cells(tiny=tiny, only=options.only)), cell


def test_the_largest_is_found_from_any_guess():
    for limit in (0, 1, 7, 20):
        assert largest(lambda size, limit=limit: size <= limit, 20) == limit
        for guess in (1, 6, 8, 20):
            asked = []

            def trains(size, limit=limit, asked=asked):
                asked.append(size)
                return size <= limit

            assert search(trains, guess, 20) == (limit, True)
            assert len(asked) == len(set(asked)) <= 10
    assert search(lambda size: None, 5, 20) == (0, False), "no time"


# ---------------------------------------------------------------- scale on paper


def test_the_page_of_scale_is_what_the_code_writes():
    for path, text in scale.files():
        assert path.read_text(encoding="utf-8") == text, "python -m benchmarks.scale"


def test_shapes_are_what_they_are_called():
    sizes = {"gpt2-124m": 124e6, "gpt2-1.5b": 1.56e9, "llama-8b": 8.03e9, "llama-70b": 70.6e9}
    for shape in scale.SHAPES:
        spec = scale.spec_of(shape)
        if isinstance(spec.model, Decoder):
            total = sum(parameter.elements for parameter in parameters(spec.model))
            assert total == pytest.approx(sizes[shape.name], rel=0.01)
    assert scale.COUNTS[0] == 8 and scale.COUNTS[-1] == 4096
    assert load_spec("llama-8b").model == scale.spec_of(scale.SHAPES[2]).model
