"""What a device's samples come to between two records."""

import random

import pytest

from scaling.profile.window import UNKNOWN, Window


def test_before_the_first_sample_nothing_is_known():
    assert Window(1).take(5) == UNKNOWN


def test_means_peaks_and_reasons():
    window = Window(1)
    window.add(0, {"power_watts": 100, "temperature_c": 60, "clock_mhz": 1000, "throttle": ["b"], "used_bytes": 5})
    window.add(1, {"power_watts": 300, "temperature_c": 70, "clock_mhz": 1500, "throttle": ["a"], "used_bytes": 4})
    window.add(2, {"power_watts": 200, "temperature_c": 65, "clock_mhz": None, "throttle": ["b"]})
    found = window.take(2)
    assert found["power_watts"] == 200 and found["temperature_c"] == 70 and found["clock_mhz"] == 1250
    assert found["throttle"] == ["a", "b"] and found["used_bytes"] == 5
    assert found["utilization"] is None is found["ecc_errors"]


def test_a_window_without_a_sample_has_the_latest_until_it_is_stale():
    window = Window(1)
    window.add(0, {"power_watts": 100, "throttle": ["a"], "xid_errors": 2})
    window.add(1, {"power_watts": 300, "throttle": [], "xid_errors": 2})
    assert window.take(1)["xid_errors"] == 2
    for now in (1.1, 1.2, 3):
        found = window.take(now)
        assert found["power_watts"] == 300 and found["throttle"] == [] and found["xid_errors"] == 0
    assert window.take(1 + window.patience_s + 0.1) == UNKNOWN
    window.add(30, {"power_watts": 50})
    assert window.take(30)["energy_joules"] is None, "nobody knows what was used while it was silent"
    window.add(31, {"power_watts": 50})
    assert window.take(31)["energy_joules"] == 50


def test_errors_are_told_even_if_they_were_the_last_thing_said():
    window = Window(1)
    window.add(0, {"ecc_errors": 4, "xid_errors": 0})
    window.add(1, {"ecc_errors": 6, "xid_errors": 1})
    window.add(2, {})
    found = window.take(2)
    assert (found["ecc_errors"], found["xid_errors"]) == (2, 1)
    found = window.take(2)
    assert (found["ecc_errors"], found["xid_errors"]) == (None, None)


@pytest.mark.parametrize("counter", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_windows_of_any_length_add_up_to_the_energy_used(seed, counter):
    """Of power that is piecewise linear between the samples, so that the trapezoidal rule is exact."""
    dice = random.Random(seed)
    window, now, power, joules = Window(1), 0.0, 200.0, 0.0

    def sample():
        window.add(now, {"power_watts": power, **({"energy_joules": 1e6 + joules} if counter else {})})

    sample()
    told = []
    for _ in range(200):
        for _ in range(dice.randrange(4)):
            told.append(window.take(now + dice.random()))
        step, next_power = dice.uniform(0.9, 1.2), dice.uniform(50, 700)
        joules += (power + next_power) / 2 * step
        now, power = now + step, next_power
        sample()
    told.append(window.take(now))
    energies = [one["energy_joules"] for one in told]
    assert min(energies) >= 0
    # What was estimated beyond the last sample in time for a read can be too much, by less than a sample's worth.
    assert sum(energies) == pytest.approx(joules, abs=700)


def test_a_counter_without_power_gives_energy():
    window = Window(1)
    for second in range(4):
        window.add(second, {"energy_joules": 1000 + 300 * second})
    assert window.take(3)["energy_joules"] == 900
    assert window.take(3.5)["energy_joules"] == pytest.approx(150), "at the rate of the last second"
    assert window.take(60)["energy_joules"] is None


def test_a_counter_that_starts_anew_is_not_believed():
    window = Window(1)
    window.add(0, {"energy_joules": 1e6, "power_watts": 100})
    window.add(1, {"energy_joules": 5, "power_watts": 100})
    assert window.take(1)["energy_joules"] == 100
    window.add(2, {"energy_joules": 3})
    assert window.take(2)["energy_joules"] is None
