"""The device monitor at work on the library of tests/fake_nvml.c, a scenario each, told as JSON on standard output.

LD_LIBRARY_PATH=FOLDER python tests/nvml_worker.py SCENARIO
"""

import atexit
import ctypes
import json
import logging
import os
import sys
import threading
import time

import pynvml

from scaling.profile import nvml
from scaling.profile.window import Window

CARD = "11111111-aaaa-bbbb-cccc-000000000001"
CUT_CARD = "22222222-aaaa-bbbb-cccc-000000000002"
INSTANCE = "33333333-aaaa-bbbb-cccc-000000000003"
INTERVAL_S = 0.02
GPU_IS_LOST = pynvml.NVML_ERROR_GPU_IS_LOST
FOR_EVER_S = 60.0


class Fake:
    """The library, seen from the other side."""

    def __init__(self):
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        self.library.fake_seconds.restype = ctypes.c_double

    def set(self, name, value):
        assert self.library.fake_set(name.encode(), ctypes.c_ulonglong(value)) == 0

    def rule(self, name, *, after=0, code=0, hang_s=0.0):
        self.library.fake_rule(name.encode(), after, code, ctypes.c_double(hang_s))

    def works_again(self, name):
        self.rule(name, after=2**31 - 1)

    def xid(self, number, instance=0xFFFFFFFF):
        self.library.fake_xid(ctypes.c_ulonglong(number), ctypes.c_uint(instance))

    def seconds(self):
        return self.library.fake_seconds()


def used_joules(begin, end):
    """The integral of 200 W + 100 W/s x t."""
    return 200 * (end - begin) + 50 * (end**2 - begin**2)


def watch(uuid=CARD, **more):
    """A sampler that has sampled."""
    sampler = nvml.Sampler(uuid, interval_s=INTERVAL_S, **more)
    until(lambda: sampler._window.heard_s > 0)
    return sampler


def until(condition, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(INTERVAL_S / 4)


def settled(sampler):
    """A read of samples that were all taken after this call."""
    after_samples(sampler, 2)
    sampler.read()
    after_samples(sampler, 3)
    return sampler.read()


def after_samples(sampler, count):
    for _ in range(count):
        heard = sampler._window.heard_s
        until(lambda heard=heard: sampler._window.heard_s > heard)


def timed(call):
    began = time.monotonic()
    found = call()
    return found, time.monotonic() - began


# ---------------------------------------------------------------- scenarios


def all_there_is(fake):
    sampler = watch(pid=os.getpid())
    fake.set("utilization", 80)
    quiet = settled(sampler)
    fake.set("throttle", 0x1 | 0x2 | 0x4 | 0x100)  # idle, application clocks, power cap, display clocks
    after_samples(sampler, 2)
    fake.set("throttle", 0x40 | 0x8)
    fake.set("clock", 1200)
    after_samples(sampler, 2)
    hot = sampler.read()
    sampler.close()
    return {"quiet": quiet, "hot": hot, "alive": sampler._thread.is_alive(), "users": fake.library.fake_users()}


def energy(fake):
    """Of a window of many samples, and of many windows with hardly a sample each; each between two bounds."""
    sampler = watch()

    def read():
        after_samples(sampler, 1)
        before = fake.seconds()
        return before, sampler.read()["energy_joules"], fake.seconds()

    began = read()
    time.sleep(0.6)
    middle, many = read(), []
    while fake.seconds() < middle[2] + 0.6:
        time.sleep(INTERVAL_S / 5)
        many.append(sampler.read()["energy_joules"])
    end = read()
    sampler.close()
    return {
        "told": [middle[1], sum(many) + end[1]],
        "least": [used_joules(began[2], middle[0]), used_joules(middle[2], end[0])],
        "most": [used_joules(began[0], middle[2]), used_joules(middle[0], end[2])],
        "windows": len(many),
        "smallest": min(many),
    }


def energy_without_counter(fake):
    fake.rule("nvmlDeviceGetTotalEnergyConsumption", code=pynvml.NVML_ERROR_NOT_SUPPORTED)
    return energy(fake)


def energy_counter_fails(fake):
    fake.rule("nvmlDeviceGetTotalEnergyConsumption", after=5, code=pynvml.NVML_ERROR_UNKNOWN)
    return energy(fake)


def old_driver(fake):
    fake.set("throttle", 0x4)
    sampler = watch(pid=1)
    return settled(sampler)


def errors(fake):
    fake.set("ecc", 5)
    sampler = watch()
    found = [sampler.read()]
    fake.set("ecc", 7)
    found.append(settled_sum(sampler))
    fake.set("ecc", 1)  # the driver was reset, and one has come since
    for number in (79, 13, 13):
        fake.xid(number)
    found.append(settled_sum(sampler))
    found.append(settled(sampler))
    return [[one["ecc_errors"], one["xid_errors"]] for one in found]


def settled_sum(sampler):
    after_samples(sampler, 2)
    return sampler.read()


def without_ecc(fake):
    fake.rule("nvmlDeviceGetTotalEccErrors", code=pynvml.NVML_ERROR_NOT_SUPPORTED)
    return settled(watch())


def lost(fake):
    """The GPU falls off the bus, and comes back."""
    names = ["PowerUsage", "TotalEnergyConsumption", "MemoryInfo", "UtilizationRates", "Temperature", "ClockInfo"]
    names += ["MaxClockInfo", "CurrentClocksEventReasons", "TotalEccErrors"]
    functions = [f"nvmlDeviceGet{name}" for name in names] + ["nvmlEventSetWait_v2"]
    sampler = watch()
    before = settled(sampler)
    for name in functions:
        fake.rule(name, code=GPU_IS_LOST)
    fake.xid(79)
    after_samples(sampler, 2)
    last_words = sampler.read()
    during = settled(sampler)
    for name in functions:
        fake.works_again(name)
    settled(sampler)
    return {"before": before, "last_words": last_words, "during": during, "after": settled(sampler)}


def one_question_fails(fake):
    sampler = watch()
    fake.rule("nvmlDeviceGetPowerUsage", after=3, code=pynvml.NVML_ERROR_UNKNOWN)
    after_samples(sampler, 4)
    return settled(sampler)


def hung(fake):
    """The driver stops answering: neither reading nor closing waits for it, nor does the end of the process."""
    Window.patience_s = 0.3
    sampler = watch()
    fake.rule("nvmlDeviceGetTemperature", hang_s=FOR_EVER_S)
    time.sleep(0.5)
    found, longest_s = {}, 0.0
    for _ in range(100):
        found, seconds = timed(sampler.read)
        longest_s = max(longest_s, seconds)
    _, closing_s = timed(sampler.close)
    return {"found": found, "longest_s": longest_s, "closing_s": closing_s}


def hung_at_once(fake):
    Window.patience_s = 0.3
    fake.rule("nvmlInitWithFlags", hang_s=FOR_EVER_S)
    sampler, starting_s = timed(lambda: nvml.Sampler(CARD, interval_s=INTERVAL_S))
    time.sleep(0.5)
    found = [sampler.read(), sampler.read()][-1]
    _, closing_s = timed(sampler.close)
    return {"found": found, "starting_s": starting_s, "closing_s": closing_s}


def instance(fake):
    sampler = watch(INSTANCE)
    fake.xid(31, instance=2)  # somebody else's
    fake.xid(43, instance=7)
    fake.xid(79)
    found = [settled_sum(sampler)]
    sampler.close()
    with_prefix = watch(f"MIG-{INSTANCE}")
    found.append(settled(with_prefix))
    return found


def cut_card(fake):
    """As torch with CUDA 11 says it: the UUID of the card, whichever instance it is."""
    return settled(watch(CUT_CARD))


def unwatchable(fake):
    sampler = nvml.Sampler("44444444-aaaa-bbbb-cccc-000000000004", interval_s=INTERVAL_S)
    until(lambda: not sampler._thread.is_alive())
    found = sampler.read()
    sampler.close()
    return found


def unexpected_answer(fake):
    sampler = watch()

    def broken(*_):
        raise ValueError("not a number")

    pynvml.nvmlDeviceGetClockInfo = broken
    return settled(sampler)


def unexpected_end(fake):
    """A bug where no question is asked."""
    nvml._questions = lambda *_: [][0]
    sampler = nvml.Sampler(CARD, interval_s=INTERVAL_S)
    until(lambda: not sampler._thread.is_alive())
    found = sampler.read()
    sampler.close()
    return {"found": found, "users": fake.library.fake_users()}


def not_closed(fake):
    """The process ends with the watch on."""
    atexit.register(
        lambda: print(json.dumps({"users": fake.library.fake_users(), "threads": threading.active_count()}))
    )
    watch()


def cost(fake):
    """Of a sample and of a read, seconds: the library's own time is next to nothing."""
    with nvml._driver(), nvml._Card(CARD, 1) as card:
        samples = [timed(card.sample)[1] for _ in range(2000)]
    sampler = watch()
    reads = [timed(sampler.read)[1] for _ in range(2000)]
    sampler.close()
    return {"sample_s": sorted(samples)[1000], "read_s": sorted(reads)[1000], "read_99_s": sorted(reads)[1980]}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    found = globals()[sys.argv[1]](None if sys.argv[1] == "unwatchable" else Fake())
    if found is not None:
        print(json.dumps(found))
