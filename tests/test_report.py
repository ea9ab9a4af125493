"""What a run did beside what was predicted: from the files of its folder, and of a real run."""

import base64
import hashlib
import json
import random
import re

import pytest
from made_runs import START, make_run, step
from processes import SPECS, python
from report_runs import PARTS, bare_run, full_run, out_of_memory_run

from scaling.errors import UserError
from scaling.report import run_report
from scaling.report.__main__ import main
from scaling.report.charts import extremes, means, stretches
from scaling.report.page import page
from scaling.summarize import read_run
from scaling.view import backend_words

GiB = 2**30


def line(step, seconds, allocated, loss=1.0, mfu=0.4):
    memory = {"allocated_peak_bytes": allocated, "reserved_peak_bytes": None, "device_used_bytes": None}
    return {
        "step": step,
        "loss": loss,
        "step_seconds": seconds,
        "mfu": mfu,
        "tokens_per_second_per_device": 100 / seconds,
        "memory": {**memory, "host_rss_bytes": 5},
    }


def run_folder(folder, lines, **plan):
    memory = {"peak_allocated_bytes": 10 * GiB, "peak_reserved_bytes": 11 * GiB, "device_used_bytes": 12 * GiB}
    duration = {"step_seconds": 2.0, "tokens_per_second_per_gpu": 50.0, "mfu": 0.5}
    plan = {"device": "NVIDIA H200", "world_size": 8, "memory": memory, "time": duration, **plan}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def test_predicted_and_measured_stand_side_by_side(tmp_path):
    # The first two warm up; step 4 was taken again after a crash; the last line is still being written.
    lines = [line(1, 9, 8 * GiB), line(2, 9, 8 * GiB), line(3, 2, 9 * GiB), line(4, 7, 9 * GiB), line(4, 3, 11 * GiB)]
    folder = run_folder(tmp_path, [*lines, line(5, 4, 9 * GiB, loss=0.5)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    found = run_report(folder)
    assert found["measured"]["step_seconds"] == 3 and found["measured_to_predicted"]["step_seconds"] == 1.5
    assert found["measured"]["peak_allocated_bytes"] == 11 * GiB
    assert found["measured_to_predicted"]["peak_allocated_bytes"] == pytest.approx(1.1)
    assert found["measured_to_predicted"]["mfu"] == pytest.approx(0.8)
    assert found["measured"]["device_used_bytes"] is None is found["measured_to_predicted"]["device_used_bytes"]
    assert found["logged_steps"] == found["last_step"] == 5 and found["loss"] == {"first": 1.0, "last": 0.5}


def test_what_is_not_known_is_null(tmp_path):
    folder = run_folder(tmp_path, [line(1, 2, None, loss=None, mfu=None)], time=None)
    found = run_report(folder)
    assert found["predicted"]["step_seconds"] is None is found["measured"]["step_seconds"]
    assert found["measured"]["peak_allocated_bytes"] is None is found["exit"]
    told = python("-m", "scaling.report", str(folder)).stdout
    assert "loss not finite -> not finite" in told and "it has not ended, or was killed" in told


def test_a_real_run(tmp_path):
    folder = tmp_path / "run"
    spec = ["--spec", str(SPECS / "gpt-parity.json"), "--set", "backend.kind=single", "--set", "max_steps=6"]
    done = python("-m", "scaling.train", *spec, "--set", "profile.interval=1", "--run-dir", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    one = json.loads(python("-m", "scaling.report", str(folder), "--json").stdout)
    assert one["exit"]["code"] == 0 and one["last_step"] == 6 and one["measured"]["step_seconds"] > 0
    assert one["predicted"]["peak_allocated_bytes"] > 0 and one["device"] == "cpu"
    assert one["model"]["parameters"] > 0 and one["time_parts"]["measured"]["forward"] > 0
    content = data_of(folder / "report.html")
    assert {"training", "memory", "configuration", "environment"} <= {section["id"] for section in content["sections"]}
    told = python("-m", "scaling.report", str(folder), str(folder), "--no-html").stdout
    assert told.count("measured / predicted") == 2 and "`python -m scaling.rehearse` counts live tensors" in told


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    for write, message in ((False, "has no plan.json"), (True, "has no logged step in metrics.jsonl")):
        if write:
            run_folder(tmp_path, [])
        with pytest.raises(UserError, match=message):
            run_report(tmp_path)
    (tmp_path / "plan.json").write_text("[1]")
    done = python("-m", "scaling.report", str(tmp_path))
    assert done.returncode == 2 and "must hold a JSON object" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- further figures


def test_all_that_a_run_recorded_is_in_the_figures(tmp_path):
    found = run_report(full_run(tmp_path / "run"))
    assert found["model"] == {"kind": "decoder", "parameters": 124_475_904, "trainable_parameters": 124_475_904}
    assert (found["backend"], found["precision"], found["max_steps"]) == ("fsdp", "bf16", 400)
    assert found["goodput"]["starts"] == 2 and 0.5 < found["goodput"]["share"] < 0.95
    assert found["pauses"] == pytest.approx({"validation": 8 * 2.0, "checkpoint": 8 * 0.2})
    assert sum(found["time_parts"]["measured"].values()) == pytest.approx(found["measured"]["step_seconds"], rel=0.02)
    assert found["time_parts"]["predicted"]["compute"] == 0.85
    assert found["memory_parts"]["measured"] == PARTS
    assert found["energy"]["joules_per_step"] == 5120.0 and found["energy"]["joules"] == 430 * 5120.0
    assert found["slowest_ranks"][0]["rank"] == 5 and len(found["slowest_ranks"]) == 2
    assert found["best_validation_step"] == 400
    json.dumps(found, allow_nan=False)


def test_the_first_steps_of_every_start_are_left_out_of_times(tmp_path):
    lines = [
        step(n, step_seconds=50.0 if n in (1, 5) else 2.0, warm_up=n in (1, 5), window_steps=1) for n in range(1, 9)
    ]
    assert run_report(make_run(tmp_path, lines))["measured"]["step_seconds"] == 2.0
    alone = run_report(make_run(tmp_path, [step(1, warm_up=True)]))
    assert alone["measured"]["step_seconds"] is None


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ({"kind": "ddp"}, "ddp"),
        ({"kind": "fsdp", "reshard_after_forward": False, "replicate": 2, "cpu_offload": True},
         "fsdp, kept gathered, 2 replicas, all on the cpu"),
        ({"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "offload_parameters": "cpu"},
         "ZeRO-3, optimizer on the nvme, parameters on the cpu"),
        ({}, None),
    ],
)  # fmt: skip
def test_backends_in_words(backend, words):
    assert backend_words(backend) == words


def test_the_summary_says_where_time_and_energy_went(tmp_path, capsys):
    assert main([str(full_run(tmp_path / "run")), "--no-html"]) == 0
    told = capsys.readouterr().out
    assert "goodput " in told and ", 2 starts" in told and "time of a step: data 0.5 %" in told
    assert "energy 5.12 kJ a step, 9.77 kJ per million tokens, 0.612 kWh in all" in told


# ---------------------------------------------------------------- the page, without a browser


def data_of(page):
    """What the page's script reads."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def charts_of(content):
    blocks = [block for section in content["sections"] for block in section["blocks"] if block["kind"] == "charts"]
    return {chart["id"]: chart for block in blocks for chart in block["charts"]}


def test_the_page_goes_beside_the_run_and_where_it_is_asked_for(tmp_path, capsys, monkeypatch):
    one, two = (full_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main([str(one)]) == 0
    assert f"page: {one / 'report.html'}" in capsys.readouterr().out and (one / "report.html").is_file()
    assert main([str(one), str(two)]) == 0
    assert [path.name for path in elsewhere.iterdir()] == ["comparison.html"] and not (two / "report.html").exists()
    assert main([str(one), "--html", "mine.html"]) == 0 and (elsewhere / "mine.html").is_file()
    assert main([str(two), "--no-html", "--json", "mine.json"]) == 0 and not (two / "report.html").exists()
    assert json.loads((elsewhere / "mine.json").read_text())["last_step"] == 400


def test_json_on_standard_output_is_nothing_but_json(tmp_path, capsys):
    runs = [str(full_run(tmp_path / name)) for name in ("one", "two")]
    assert main([*runs, "--json", "--html", str(tmp_path / "page.html")]) == 0
    assert [one["run"] for one in json.loads(capsys.readouterr().out)] == runs


def test_a_place_that_cannot_be_written_to_is_refused_with_a_remedy(tmp_path):
    run = full_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"`--html` must be a file that can be written, but .*no-such.*; name another"):
        main([str(run), "--html", str(tmp_path / "no-such" / "page.html")])
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match="or pass `--no-html`"):
        main([str(run)])
    with pytest.raises(UserError, match="not allowed with"):
        main([str(run), "--html", "a", "--no-html"])


def test_the_page_is_the_same_each_time_and_says_nothing_of_where_it_was_made(tmp_path):
    run = full_run(tmp_path / "run")
    assert main([str(run)]) == 0
    first = (run / "report.html").read_text()
    assert main([str(run)]) == 0
    assert (run / "report.html").read_text() == first and str(tmp_path) not in first


def test_the_page_lets_its_own_script_run_and_nothing_be_loaded(tmp_path):
    assert main([str(full_run(tmp_path / "run"))]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert set(re.findall(r"https?://[^\s\"']*", text)) <= {"http://www.w3.org/2000/svg"} and "innerHTML" not in text
    assert re.findall("<(?:link|img|iframe|script) [^>]*>", text) == [
        '<link rel="icon" href="data:,">',
        '<script type="application/json" id="data">',
    ]


def test_sections_stand_in_their_order_and_those_without_data_are_left_out(tmp_path):
    assert main([str(full_run(tmp_path / "full"))]) == 0
    full = data_of(tmp_path / "full" / "report.html")
    order = ["training", "speed", "time", "memory", "device", "ranks", "validation", "checkpoints", "configuration",
             "environment"]  # fmt: skip
    assert [section["id"] for section in full["sections"]] == order
    assert main([str(bare_run(tmp_path / "bare"))]) == 0
    bare = data_of(tmp_path / "bare" / "report.html")
    assert [section["id"] for section in bare["sections"]] == ["training", "speed", "memory"]
    assert list(charts_of(bare)) == ["loss", "memory"] and bare["clock"] == "training time"
    assert main([str(out_of_memory_run(tmp_path / "oom"))]) == 0
    assert data_of(tmp_path / "oom" / "report.html")["sections"][0]["id"] == "oom"


def test_a_run_that_ended_before_its_first_step_still_has_a_page(tmp_path):
    run = out_of_memory_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    (run / "validation.jsonl").write_text("")
    report = run_report(run)
    assert report["last_step"] is None and report["loss"] == {"first": None, "last": None}
    assert main([str(run)]) == 0
    content = data_of(run / "report.html")
    assert content["sections"][0]["id"] == "oom" and not charts_of(content)
    other = full_run(tmp_path / "other")
    assert main([str(run), str(other), "--html", str(tmp_path / "both.html")]) == 0


def test_restarts_checkpoints_rollbacks_and_refused_steps_are_marked(tmp_path):
    assert main([str(full_run(tmp_path))]) == 0
    found = [(mark["kind"], mark["step"]) for mark in data_of(tmp_path / "report.html")["marks"]]
    assert ("restart", 150) in found and ("rollback", 250) in found and ("failed", 300) in found
    assert ("refused", 237) in found and ("restart", 0) not in found
    assert [step for kind, step in found if kind == "checkpoint"] == [50, 100, 150, 200, 250, 350, 400]


def test_seconds_since_the_start_include_what_a_crash_cost(tmp_path):
    assert main([str(full_run(tmp_path))]) == 0
    content = data_of(tmp_path / "report.html")
    grid = content["grids"][charts_of(content)["loss"]["series"][0]["grid"]]
    time = dict(zip(grid["step"], grid["time"], strict=True))
    # 30 steps were taken twice, and the restart took a minute.
    assert time[151] - time[150] > 60 + 30 and time[152] - time[151] < 3


def test_predicted_parts_stand_beside_measured_ones_or_beside_the_one_number_known(tmp_path):
    run = full_run(tmp_path)
    for counted in (True, False):
        if not counted:
            (run / "memory.json").unlink()
        assert main([str(run)]) == 0
        memory = next(one for one in data_of(run / "report.html")["sections"] if one["id"] == "memory")
        (stack,) = (block for block in memory["blocks"] if block["kind"] == "stack")
        predicted, measured = stack["rows"]
        assert predicted["name"] == "predicted" and len(predicted["parts"]) == 7
        assert [key for key, _, _ in measured["parts"]] == (list(PARTS) if counted else ["allocated, at the peak"])


def test_gradients_of_layers_are_a_chart_of_few_of_them(tmp_path):
    assert main([str(full_run(tmp_path))]) == 0
    charts = charts_of(data_of(tmp_path / "report.html"))
    assert "grad-norm-groups" not in charts, "of one group it is the whole"
    shown = [series["name"] for series in charts["grad-norm-layers"]["series"]]
    assert len(shown) == 8 and shown[0] == "layers.0" and shown[-1] == "layers.11"
    assert charts["grad-norm-layers"]["title"].endswith("(8 of 12)")


def test_findings_are_shown_with_their_flags(tmp_path):
    run = full_run(tmp_path)
    finding = {"rule": "lr", "severity": "warning", "title": "t", "evidence": "e", "threshold": "s", "advice": "a",
               "set": {"optimizer.lr": 3e-4, "backend": {"kind": "fsdp"}}}  # fmt: skip
    report = run_report(run) | {"findings": [finding]}
    (tmp_path / "page.html").write_text(page(read_run(run), report))
    (shown,) = data_of(tmp_path / "page.html")["findings"]
    assert shown["set"] == ["--set optimizer.lr=0.0003", """--set 'backend={"kind": "fsdp"}'"""]


def test_a_comparison_shows_what_specs_differ_in_and_nothing_else(tmp_path):
    runs = [full_run(tmp_path / "a"), full_run(tmp_path / "b", seed=1, spec={"optimizer": {"lr": 1e-3}})]
    assert main([*map(str, runs), "--html", str(tmp_path / "page.html")]) == 0
    content = data_of(tmp_path / "page.html")
    sections = {section["id"]: section["blocks"] for section in content["sections"]}
    assert sections["differences"][0]["rows"] == [["optimizer.lr", "0.0006", "0.001"]]
    assert [row[0] for row in sections["runs"][0]["rows"]] == content["runs"] == ["a", "b"]
    assert content["facts"] == ["8 \N{MULTIPLICATION SIGN} NVIDIA H100 80GB HBM3", "fsdp", "bf16"]
    assert [series["run"] for series in charts_of(content)["grad-norm"]["series"]] == [0, 1]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [full_run(tmp_path / name / "run") for name in "ab"]
    assert main([*map(str, runs), "--html", str(tmp_path / "page.html")]) == 0
    assert data_of(tmp_path / "page.html")["runs"] == ["run (1)", "run (2)"]


# ---------------------------------------------------------------- thinning


def test_thinning_keeps_ends_lowest_and_highest_values_and_gaps():
    noise = random.Random(1)
    column = [noise.gauss(0, 1) for _ in range(10_000)]
    column[3_333], column[7_777], column[5_000] = 100.0, -100.0, None
    rows = extremes([column], 1_000)
    assert len(rows) <= 1_100 and rows == sorted(set(rows))
    assert {0, 3_333, 5_000, 7_777, 9_999} <= set(rows)
    assert extremes([column[:900]], 1_000) == list(range(900))


def test_thinned_layers_keep_their_sums():
    values, weights = [float(value) for value in range(1_000)], [1, 3] * 500
    parts = means(values, weights, 7)
    sums = [sum(weights[begin:end]) for begin, end in stretches(1_000, 7)]
    whole = sum(value * weight for value, weight in zip(values, weights, strict=True))
    assert sum(mean * weight for mean, weight in zip(parts, sums, strict=True)) == pytest.approx(whole)


def test_a_long_run_is_thinned_and_the_page_says_so(tmp_path):
    lines = [step(number, window_steps=1, warm_up=False, loss=9.0 if number == 12_345 else 2.0 + 1 / number)
             for number in range(1, 20_001)]  # fmt: skip
    run = make_run(tmp_path, lines, validations=[])
    assert main([str(run)]) == 0
    page_ = run / "report.html"
    assert page_.stat().st_size < 5e6 / 2
    content = data_of(page_)
    assert content["thinned"] == [f"{tmp_path.name}: 20,000 logged steps"]
    (loss,) = charts_of(content)["loss"]["series"]
    grid = content["grids"][loss["grid"]]
    assert len(loss["values"]) < 3_000 and 9.0 in loss["values"] and 12_345 in grid["step"]
    assert max(loss["means"]["values"]) < 4  # the smoothed curve is of all records, not of the extremes
    assert len(charts_of(content)["time-parts"]["series"][0]["values"]) <= 480


def test_tensors_counted_on_a_cpu_stand_beside_what_was_predicted(tmp_path, capsys):
    nothing = dict.fromkeys(("allocated_peak_bytes", "active_peak_bytes", "reserved_peak_bytes", "device_used_bytes"))
    run = make_run(tmp_path, [step(n, memory=nothing, warm_up=False) for n in range(1, 5)], device="cpu", world_size=2)
    assert main([str(run), "--no-html"]) == 0 and "`python -m scaling.rehearse`" in capsys.readouterr().out
    (run / "memory.json").write_text(json.dumps({"step": 2, "peak_allocated_bytes": 61 * GiB, "parts": PARTS}))
    assert main([str(run), "--no-html"]) == 0 and "`python -m scaling.rehearse`" not in capsys.readouterr().out
    assert run_report(run)["measured_to_predicted"]["peak_allocated_bytes"] == pytest.approx(61 / 59)


def test_what_another_version_or_hand_wrote_into_events_is_shown_as_it_is(tmp_path):
    run = full_run(tmp_path)
    details = {"bytes": "many", "of {x}": [1]}
    strange = {"event": "visit", "wall_time": START + 10_000, "step": None, "details": details}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(strange) + "\n")
    assert main([str(run)]) == 0
    history = next(one for one in data_of(run / "report.html")["sections"] if one["id"] == "checkpoints")
    rows = history["blocks"][1]["rows"]
    assert rows[0][2:] == ["start", "fsdp, 8 ranks, on node0"]
    assert [*rows[-1][1:]] == ["n/a", "visit", "bytes: many, of {x}: [1]"]
