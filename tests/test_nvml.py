"""The device monitor: pynvml and the thread as they are, on a library made for the purpose (tests/fake_nvml.c)."""

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ENVIRONMENT, ROOT

from scaling.profile import nvml
from scaling.profile.nvml import DeviceMonitor
from scaling.profile.window import UNKNOWN

GiB = 2**30
SOURCE = Path(__file__).parent / "fake_nvml.c"
INSTANCE = "MIG-33333333-aaaa-bbbb-cccc-000000000003"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Folders with a libnvidia-ml.so.1: of today's driver, of an old one, and none."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a driver's library with")
    found = {}
    for name, flags in {"new": [], "old": ["-DOLD"]}.items():
        found[name] = tmp_path_factory.mktemp(name)
        made = ["-shared", "-fPIC", *flags, "-o", str(found[name] / "libnvidia-ml.so.1"), str(SOURCE)]
        subprocess.run([compiler, *made], check=True)
    found["none"] = tmp_path_factory.mktemp("none")
    return found


@pytest.fixture(scope="module")
def scenario(libraries):
    """Run one of tests/nvml_worker.py, once; returns what it found and what it said."""

    @functools.cache
    def run(name, library="new", **environment):
        command = [sys.executable, str(ROOT / "tests" / "nvml_worker.py"), name]
        environment = {**ENVIRONMENT, "LD_LIBRARY_PATH": str(libraries[library]), **environment}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout), done.stderr.splitlines()

    return run


def test_everything_that_a_gpu_says(scenario):
    found, said = scenario("all_there_is")
    quiet, hot = found["quiet"], found["hot"]
    assert quiet.keys() == hot.keys() == UNKNOWN.keys() and None not in quiet.values() and not said
    assert (quiet["used_bytes"], quiet["process_bytes"], quiet["temperature_c"]) == (40 * GiB, 2 * GiB, 61)
    assert quiet["utilization"] == pytest.approx(0.8) and (quiet["clock_mhz"], quiet["max_clock_mhz"]) == (1500, 1980)
    assert quiet["throttle"] == [] and quiet["ecc_errors"] == quiet["xid_errors"] == 0
    assert 200 < quiet["power_watts"] < hot["power_watts"]
    assert 1200 < hot["clock_mhz"] < 1500, "the mean of before and after"


def test_an_idle_gpu_and_clocks_that_somebody_set_are_no_throttling(scenario):
    found, _ = scenario("all_there_is")
    assert found["hot"]["throttle"] == ["hw_slowdown", "hw_thermal_slowdown", "sw_power_cap"]


def test_closing_ends_the_thread_and_leaves_the_driver(scenario):
    found, _ = scenario("all_there_is")
    assert found["alive"] is False and found["users"] == 0


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("energy", "new"),
        ("energy_without_counter", "new"),
        ("energy_without_counter", "old"),
        ("energy_counter_fails", "new"),
    ],
)
def test_energy_is_the_integral_of_power(scenario, name, library):
    found, said = scenario(name, library)
    for told, least, most in zip(found["told"], found["least"], found["most"], strict=True):
        assert 0.95 * least < told < 1.05 * most
    assert found["windows"] > 20 and found["smallest"] >= 0
    assert [line for line in said if "energy_joules" not in line] == []
    assert len(said) == (name == "energy_counter_fails")


def test_what_an_old_driver_lacks_is_none_without_a_word(scenario):
    found, said = scenario("old_driver", "old")
    assert found["throttle"] == ["sw_power_cap"] and found["power_watts"] > 200 and found["energy_joules"] > 0
    assert found["xid_errors"] is None is found["process_bytes"]
    assert not said


def test_new_errors_are_counted_once(scenario):
    found, said = scenario("errors")
    ecc, xid = zip(*found, strict=True)
    assert ecc == (0, 2, 1, 0), "5 were there before; the count began anew before the third reading"
    assert xid == (0, 0, 3, 0)
    assert [re.findall(r"\d+", line) for line in said] == [["79"], ["13"]], "each kind is said once"


def test_where_ecc_is_off_its_errors_are_none(scenario):
    found, said = scenario("without_ecc")
    assert found["ecc_errors"] is None and found["power_watts"] > 200 and not said


def test_a_gpu_that_is_lost_is_said_once_and_comes_back(scenario):
    found, said = scenario("lost")
    assert found["last_words"]["xid_errors"] == 1
    assert found["during"] == UNKNOWN
    assert {name for name, value in found["after"].items() if value is None} == {"process_bytes"}
    failures = [line.split(" for ")[1].removesuffix(": GPU is lost") for line in said if "GPU is lost" in line]
    assert sorted(", ".join(failures).split(", ")) == sorted(UNKNOWN.keys() - {"process_bytes"}), "each once"
    assert len(said) == len(failures) + 1 <= 3


def test_one_question_that_fails_leaves_the_others(scenario):
    found, said = scenario("one_question_fails")
    assert found["power_watts"] is None and found["temperature_c"] == 61 and found["energy_joules"] > 0
    assert len(said) == 1 and "power_watts: Unknown Error" in said[0]


def test_a_driver_that_hangs_holds_up_nobody(scenario):
    began = time.monotonic()
    found, said = scenario("hung")
    assert time.monotonic() - began < 30, "the process did not wait for the driver, which hangs for a minute"
    assert found["found"] == UNKNOWN
    assert found["longest_s"] < 1 and found["closing_s"] < nvml.CLOSING_S + 3
    assert len(said) == 1 and "has not answered for" in said[0]


def test_a_driver_that_hangs_from_the_start_holds_up_nobody(scenario):
    found, said = scenario("hung_at_once")
    assert found["found"] == UNKNOWN and found["starting_s"] < 1 and found["closing_s"] < nvml.CLOSING_S + 3
    assert len(said) == 1 and "has not answered for" in said[0]


def test_a_mig_instance_has_memory_of_its_own_and_no_power(scenario):
    found, said = scenario("instance")
    for one in found:  # by torch's bare UUID, and by nvidia-smi's
        assert one["used_bytes"] == 3 * GiB and one["temperature_c"] == 62 and one["clock_mhz"] == 1500
        assert one["power_watts"] is None is one["energy_joules"] and one["utilization"] is None
    assert found[0]["xid_errors"] == 2, "its own and the card's, not the other instance's"
    assert [re.findall(r"\d+", line) for line in said] == [["43"], ["79"]]


def test_an_instance_under_the_name_of_its_card_is_found_if_it_is_the_visible_one(scenario):
    found, _ = scenario("cut_card", CUDA_VISIBLE_DEVICES=INSTANCE)
    assert found["used_bytes"] == 3 * GiB and found["power_watts"] is None
    found, _ = scenario("cut_card", CUDA_VISIBLE_DEVICES="0")
    assert found["used_bytes"] is None is found["power_watts"] and found["temperature_c"] == 62


@pytest.mark.parametrize(("library", "reason"), [("none", "NVML Shared Library Not Found"), ("new", "Not Found")])
def test_no_driver_and_an_unknown_gpu_are_said_once(scenario, library, reason):
    found, said = scenario("unwatchable", library)
    assert found == UNKNOWN
    assert len(said) == 1 and said[0].startswith("WARNING") and said[0].endswith(f"not recorded: {reason}")


def test_what_nobody_expected_ends_no_thread_with_a_traceback(scenario):
    found, said = scenario("unexpected_answer")
    assert found["clock_mhz"] is None and found["power_watts"] > 200 and len(said) == 1
    found, said = scenario("unexpected_end")
    assert found == {"found": UNKNOWN, "users": 0} and len(said) == 1 and "IndexError" in said[0]


def test_a_process_that_does_not_close_it_ends_all_the_same(scenario):
    found, said = scenario("not_closed")
    assert found == {"users": 0, "threads": 1} and not said


# ---------------------------------------------------------------- without a library


def test_a_cpu_costs_nothing_and_says_nothing(monkeypatch, caplog):
    monkeypatch.setattr(nvml, "Sampler", None)
    before = threading.active_count()
    with caplog.at_level(logging.DEBUG):
        monitor = DeviceMonitor(torch.device("cpu"))
        assert monitor.read() == UNKNOWN and monitor.read() is not UNKNOWN
        monitor.close()
    assert threading.active_count() == before and not caplog.records


def test_the_gpu_is_found_by_the_uuid_that_torch_gives(monkeypatch):
    asked = []

    def properties(device):
        return SimpleNamespace(uuid=f"uuid-of-{device}")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(nvml, "Sampler", lambda uuid, **more: asked.append((uuid, more["interval_s"])))
    DeviceMonitor(torch.device("cuda", 3), interval_s=0.5)
    assert asked == [("uuid-of-cuda:3", 0.5)]


def test_in_a_container_the_pid_is_not_believed(monkeypatch):
    monkeypatch.setattr(os, "readlink", lambda _: nvml.INITIAL_PID_NAMESPACE)
    assert nvml._driver_pid() == os.getpid()
    monkeypatch.setattr(os, "readlink", lambda _: "pid:[4026533000]")
    assert nvml._driver_pid() is None
