"""The order of the test files, and a log that each test finds as pytest expects it."""

import logging
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side, a core each

LONG = (
    *("test_recipes", "test_parity", "test_watch", "test_train", "test_ledger", "test_ppo", "test_lora"),
    *("test_huggingface_vla", "test_features", "test_postmortem", "test_trace", "test_engine", "test_wrong_specs"),
    *("test_benchmarks_run", "test_huggingface", "test_blocks", "test_other_models", "test_chaos", "test_resume"),
    "test_recorded",
)
"""Begun first, so that no worker is left with one of them when the other has nothing more to do."""


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("fault", marker.args[0]) for marker in item.iter_markers("fault")]
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _log_is_heard():
    """A run within the process of the tests keeps its log to itself from then on: later tests would hear nothing.

    Put right before a test as well as after it, since what its module's fixtures run is before it. pytest hands its own
    handlers to a log that is kept to itself: left on one that is not, each line would be told twice.
    """
    logger = logging.getLogger("scaling")
    level = logger.level
    _free(logger)
    yield
    _free(logger)
    logger.setLevel(level)


def _free(logger):
    logger.handlers.clear()
    logger.propagate = True
