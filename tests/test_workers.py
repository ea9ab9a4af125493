"""Work over several processes: in order, forked only where that is safe, errors as in one."""

import os
import sys

import pytest

from scaling.errors import UserError
from scaling.estimate import workers
from scaling.estimate.workers import mapped


def place(item, shared):
    return item * shared["factor"], os.getpid()


def refuse(item, shared):
    if item == shared:
        raise UserError(f"{item} must be another")
    return item


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
@pytest.mark.usefixtures("two_cores")
def test_results_come_in_order_from_other_processes():
    found = list(mapped(place, range(50), {"factor": 3}))
    assert [value for value, _ in found] == [3 * item for item in range(50)]
    pids = {pid for _, pid in found}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("alone", ["torch", "one core", "one item"])
def test_nothing_is_forked_where_it_would_not_be_safe_or_of_use(monkeypatch, alone):
    items = range(1 if alone == "one item" else 5)
    if alone == "torch":
        monkeypatch.setitem(sys.modules, "torch", object())
    if alone == "one core":
        monkeypatch.setattr(workers, "_cores", lambda: 1)
    assert {pid for _, pid in mapped(place, items, {"factor": 1})} == {os.getpid()}


@pytest.mark.usefixtures("two_cores")
def test_an_error_is_raised_as_it_is():
    with pytest.raises(UserError, match="3 must be another"):
        list(mapped(refuse, range(9), 3))
