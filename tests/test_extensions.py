"""Locks on torch's compiled extensions: a dead process's is removed, a living one's is not."""

import subprocess
import sys

import pytest
import torch
from torch.utils import cpp_extension

from scaling.engine.extensions import remove_stale_locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "async_io").mkdir()
    return tmp_path / "async_io" / "lock"


@pytest.fixture
def maker(lock):
    """A process that holds the lock as torch's builds do."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.fault("locks")
def test_the_lock_of_a_killed_process_is_removed(lock, maker, caplog):
    maker.kill()
    maker.wait()
    assert lock.exists(), "what this is about"
    assert remove_stale_locks(["async_io", "pin_memory"]) == [lock]
    assert not lock.exists() and str(lock) in caplog.text


@pytest.mark.fault("locks")
def test_the_lock_of_a_process_at_work_is_left(lock, maker):
    assert remove_stale_locks(["async_io"]) == [] and lock.exists()


def test_other_extensions_are_none_of_our_business(lock):
    lock.touch()
    assert remove_stale_locks(["pin_memory"]) == [] and lock.exists()


def test_the_folder_is_the_one_that_torch_uses(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(torch._appdirs, "user_cache_dir", lambda appname: str(tmp_path))
    lock = cpp_extension._get_build_directory("async_io", verbose=False) + "/lock"
    open(lock, "w").close()
    assert [str(path) for path in remove_stale_locks(["async_io"])] == [lock]
