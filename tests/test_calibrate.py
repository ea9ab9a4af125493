"""Calibration: figures are measured and told whole, and the planner gets them as they are. No speed is asserted."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import ENVIRONMENT, ROOT, python, torchrun

from scaling import plan
from scaling.calibrate.__main__ import main, results
from scaling.calibrate.result import HOST_COPIES, Figure, Found, Sizes, figure, hardware_file
from scaling.errors import UserError
from scaling.estimate.collectives import ring
from scaling.estimate.rates import host_rate, rates_of
from scaling.hardware import GPU, Cluster, Measured, find_gpu, load_hardware
from scaling.view import plain

TINY = Sizes(
    matmul=((32, 32, 32), (64, 64, 64)),
    attention=((1, 1, 32, 16),),
    copy_bytes=(4096,),
    host_bytes=(),
    message_bytes=(4096, 8192),
)
ON_A_CPU = {f"{precision}_{what}_flops" for precision in ("bf16", "fp32") for what in ("matmul", "attention")} | {
    "hbm_bytes_per_s"
}
BETWEEN_RANKS = {"all_gather_bytes_per_s", "all_reduce_bytes_per_s"}
RATES = [one.name for one in dataclasses.fields(Measured) if one.name not in ("device", "device_type")]


def made_up(device="NVIDIA H200", device_type="cuda", ranks=8):
    """As if all had been measured: each figure another number, the table's for none."""
    names = [name for name in RATES if name != "host_bytes_per_s"] + [*HOST_COPIES]
    figures = {name: Figure(1e9 * (i + 1) + 0.1, 1e9, 1e11, 5, "made up") for i, name in enumerate(names)}
    facts = {"ranks": ranks, "nodes": 1, "seconds": 1.0}
    return Found(device, device_type, 2**37, figures, {}, facts)


def saved(path, found):
    path.write_text(json.dumps(hardware_file(found)))
    return load_hardware(path)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Two ranks on a CPU, for real."""
    path = tmp_path_factory.mktemp("calibrated") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert main(["--out", str(path), "--ranks", "2", "--seconds", "1"], TINY) == 0
    return path


# ---------------------------------------------------------------- measured here


def test_two_ranks_measure_what_a_cpu_has(calibrated):
    values = json.loads(calibrated.read_text())
    assert values["name"] == "cpu" and values["measured"]["device_type"] == "cpu" and values["device_names"] == []
    found = {name for name in RATES if values["measured"][name] is not None}
    assert found == set(values["calibration"]["figures"]) == ON_A_CPU | BETWEEN_RANKS
    assert set(values["calibration"]["not_measured"]) == set(RATES) - found
    assert values["calibration"]["figures"]["all_reduce_bytes_per_s"]["of"].startswith("2 ranks, ")
    peaks = [one.name for one in dataclasses.fields(GPU) if one.name.endswith(("_flops", "_per_s"))]
    assert peaks and all(values[name] is None for name in peaks), "no number that was not measured"


def test_each_figure_tells_its_spread(calibrated):
    values = json.loads(calibrated.read_text())
    for name, one in values["calibration"]["figures"].items():
        assert 0 < one["lowest"] <= one["median"] <= one["highest"] and one["repeats"] >= 3 and one["of"], name
        assert values["measured"][name] == one["median"]


def test_the_file_tells_where_it_comes_from(calibrated):
    told = json.loads(calibrated.read_text())["calibration"]
    assert told["device"] and told["device_type"] == "cpu" and told["collectives"] == "gloo"
    assert (told["ranks"], told["nodes"]) == (2, 1) and told["threads"] >= 1
    assert told["versions"]["torch"] and told["date"].startswith("20") and "median" in told["method"]
    assert list(calibrated.parent.iterdir()) == [calibrated], "nothing else is left"


def test_the_file_comes_back_whole(calibrated):
    gpu, values = load_hardware(calibrated), json.loads(calibrated.read_text())
    assert dataclasses.asdict(gpu.measured) == values["measured"]
    assert gpu.is_cpu and gpu.memory_bytes == values["memory_bytes"]
    rates, links = rates_of(gpu, "bf16"), ring(Cluster(1, 2, gpu), 2)
    assert rates.matmul == values["measured"]["bf16_matmul_flops"]
    assert links.bandwidth == values["measured"]["all_gather_bytes_per_s"]


@pytest.mark.parametrize("gpus", [["--gpus", "2xcpu"], []])
def test_the_planner_takes_it_for_no_gpu(calibrated, capsys, gpus):
    words = ["--spec", "gpt-stdlib", "--hardware", str(calibrated), "--as-written", *gpus]
    assert plan.main(words) == 0
    out = capsys.readouterr().out
    assert "cpu is no GPU" in out and "usable memory of each CPU rank" in out and "GPU hours" not in out
    assert plan.main([*words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["as_written"]["time"]["step_seconds"] > 0 and planned["as_written"]["time"]["mfu"] is None
    assert planned["hardware"]["is_cpu"] and planned["hardware"]["measured_on"]


def test_ranks_of_a_launcher(tmp_path):
    path = tmp_path / "cpu.json"
    done = torchrun(1, "-m", "scaling.calibrate", "--out", str(path), "--seconds", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    gpu = load_hardware(path)
    assert gpu.measured.fp32_matmul_flops and gpu.measured.all_gather_bytes_per_s is None


def test_a_launcher_has_chosen_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="`--ranks` must be absent under a launcher"):
        main(["--out", str(tmp_path / "cpu.json"), "--ranks", "2"])


def test_interrupted_it_leaves_nothing(tmp_path):
    # Whoever runs the tests in the background may have had SIGINT ignored, which is inherited.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import runpy, sys; "
    words = ["--out", str(tmp_path / "cpu.json"), "--seconds", "60"]
    program = heard + f"sys.argv[1:] = {words!r}; runpy.run_module('scaling.calibrate', run_name='__main__')"
    command = [sys.executable, "-c", program]
    running = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, start_new_session=True)
    time.sleep(6)  # wherever it is: importing, starting ranks, measuring
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=30)  # to the end of stderr, which every rank has open: all are gone
    assert running.returncode == 130 and b"Traceback" not in said and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what becomes of figures


def test_a_figure_is_the_median_of_rates():
    assert figure(6.0, [1.0, 2.0, 6.0], 3, "x") == Figure(median=3.0, lowest=1.0, highest=6.0, repeats=3, of="x")


def test_measured_rates_are_taken_as_they_are(tmp_path):
    found = made_up()
    gpu = saved(tmp_path / "h200.json", found)
    medians = {name: one.median for name, one in found.figures.items()}
    for precision in ("bf16", "fp16", "fp32"):
        rates = rates_of(gpu, precision)
        assert rates.matmul == medians[f"{precision}_matmul_flops"]
        assert rates.attention == medians[f"{precision}_attention_flops"]
        assert rates.hbm == medians["hbm_bytes_per_s"]
    assert host_rate(gpu) == min(medians[name] for name in HOST_COPIES)
    node, two = ring(Cluster(1, 8, gpu), 8), ring(Cluster(2, 2, gpu), 4)
    assert node.bandwidth == medians["all_gather_bytes_per_s"]
    assert node.switch_bandwidth == medians["all_reduce_bytes_per_s"]
    assert two.bandwidth == min(medians["all_gather_bytes_per_s"], 2 * medians["network_bytes_per_s"])


def test_peaks_stay_those_of_the_table(tmp_path):
    gpu, known = saved(tmp_path / "h200.json", made_up()), find_gpu("H200")
    assert dataclasses.replace(gpu, measured=Measured()) == dataclasses.replace(
        known, memory_bytes=2**37, device_names=("NVIDIA H200",)
    )
    assert gpu.peak_flops("bf16") == known.peak_flops("bf16") and not gpu.is_cpu


def test_an_unknown_card_has_no_peaks_and_its_own_name(tmp_path):
    gpu = saved(tmp_path / "x.json", made_up("NVIDIA X9"))
    assert gpu.name == "NVIDIA X9" and gpu.bf16_flops is None and gpu.link_bytes_per_s is None
    assert rates_of(gpu, "bf16").matmul == gpu.measured.bf16_matmul_flops


def test_what_was_not_measured_comes_from_the_peaks_or_is_missed(tmp_path):
    found = dataclasses.replace(made_up(), figures={"bf16_matmul_flops": Figure(1e14, 1e14, 1e14, 3, "x")})
    gpu, known = saved(tmp_path / "h200.json", found), find_gpu("H200")
    assert rates_of(gpu, "bf16") == dataclasses.replace(rates_of(known, "bf16"), matmul=1e14)
    assert rates_of(gpu, "fp32") == rates_of(known, "fp32") and ring(Cluster(1, 8, gpu), 8).bandwidth > 0
    alone = saved(tmp_path / "x.json", dataclasses.replace(found, device="NVIDIA X9"))
    with pytest.raises(UserError, match="`bf16_flops` of the NVIDIA X9 must be known"):
        rates_of(alone, "bf16")  # attention was not measured


def test_the_table_of_results_tells_all():
    found = dataclasses.replace(made_up(), not_measured={"network_bytes_per_s": "there was one node"})
    text = plain(results(found))
    assert "NVIDIA H200 (GPU), 8 ranks" in text and "there was one node" in text and "GB/s" in text


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out"),
        (["--out", "/nowhere/x.json"], "`--out` must be a file that can be written"),
        (["--out", "."], "`--out` must be a file, but '.' is a folder"),
        (["--out", "x\0y"], "`--out` must be a file that can be written"),
        (["--out", "x.json", "--ranks", "0"], "must be a whole number from 1"),
        (["--out", "x.json", "--seconds", "soon"], "must be a whole number from 1"),
    ],
)
def test_wrong_arguments(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(words)
    assert said in str(caught.value) and caught.value.code == 2 and not list(tmp_path.iterdir())


def test_a_mistake_is_one_line():
    done = python("-m", "scaling.calibrate", "--out", "/nowhere/x.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"hbm_bytes": 1}, "`measured` must have keys that calibrate writes only, but has 'hbm_bytes'"),
        ({"hbm_bytes_per_s": -1}, "`measured.hbm_bytes_per_s` must be a positive number or null"),
        ({"device": 3}, "`measured.device` must be a text"),
        ({"device_type": "tpu"}, '`measured.device_type` must be "cuda" or "cpu"'),
        ("fast", "`measured` must be an object or null"),
    ],
)
def test_wrong_measured_values(tmp_path, measured, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"name": "X1", "measured": measured}))
    with pytest.raises(UserError) as caught:
        load_hardware(path)
    assert message in str(caught.value)
