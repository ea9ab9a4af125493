"""The folder of checkpoints, without tensors: what a manifest notices, what a crash leaves, what retention spares."""

import json
import os
import random
import subprocess
import sys

import pytest
from processes import ROOT

from scaling.checkpoint.store import BEST, LATEST, MANIFEST, Store, extra_files, problems_of, write_synced

FILES = {f"__{rank}_0.distcp": f"values of rank {rank} " * 40 for rank in range(20)} | {".metadata": "an index"}


def commit(store: Store, step: int, files: dict[str, str] = FILES) -> None:
    folder = store.begin(step)
    store.commit(folder, step, {name: write_synced(folder / name, f"{step} {text}") for name, text in files.items()})


def whole(store: Store) -> list[int]:
    return [step for step in store.steps() if not problems_of(store.path(step))]


def test_a_committed_checkpoint_is_whole_and_named(tmp_path):
    store = Store(tmp_path / "checkpoints")
    commit(store, 3)
    assert store.steps() == whole(store) == [3] and store.pointed(LATEST) == 3
    assert (store.folder / LATEST).read_text() == "step-00000003\n"
    assert sorted(os.listdir(store.folder)) == ["latest", "step-00000003"]


def corruptions(folder):
    """(what, do it) for every file, the manifest included."""
    for name in [*FILES, MANIFEST]:
        path = folder / name

        def flip(path=path, name=name):
            data = bytearray(path.read_bytes())
            data[random.Random(str(path)).randrange(len(data))] ^= 1 << random.Random(name).randrange(8)
            path.write_bytes(data)

        def zero_tail(path=path):
            data = path.read_bytes()
            path.write_bytes(data[:-7] + bytes(7))

        def link(path=path):
            path.rename(folder.parent / f"elsewhere-{path.name}")
            path.symlink_to(folder.parent / f"elsewhere-{path.name}")

        yield f"{name} shortened", lambda path=path: os.truncate(path, path.stat().st_size - 1)
        yield f"{name} emptied", lambda path=path: os.truncate(path, 0)
        yield f"{name} with a bit flipped", flip
        yield f"{name} with zeros at its end", zero_tail
        yield f"{name} deleted", path.unlink
        if name != MANIFEST:
            yield f"{name} a link", link


def test_every_corruption_of_every_file_is_noticed_and_named(tmp_path):
    count = 0
    store = Store(tmp_path / "checkpoints")
    commit(store, 1)
    for number, _ in enumerate(corruptions(store.path(1))):
        commit(store, 2)
        what, damage = list(corruptions(store.path(2)))[number]
        assert problems_of(store.path(2)) == []
        damage()
        (problem,) = problems_of(store.path(2))
        assert str(store.path(2) / what.split()[0]) in problem, what
        assert whole(store) == [1]
        count += 1
    assert count == 22 * 5 + 21


def test_every_bit_of_a_manifest_counts(tmp_path):
    store = Store(tmp_path)
    commit(store, 1, {"a": "b"})
    path = store.path(1) / MANIFEST
    text = path.read_bytes()
    for position in range(len(text)):
        changed = bytearray(text)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert problems_of(store.path(1)), f"byte {position}: {text[position : position + 1]!r}"


def test_the_reading_is_shared_without_a_gap(tmp_path):
    store = Store(tmp_path)
    commit(store, 1)
    for name in FILES:
        (store.path(1) / name).write_text("x")
    found = [problem for part in range(3) for problem in problems_of(store.path(1), part, 3)]
    assert sorted(found) == sorted(problems_of(store.path(1))) and len(found) == len(FILES)


@pytest.mark.fault("S5")
@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", MANIFEST])
def test_a_manifest_cannot_name_what_lies_elsewhere(tmp_path, name):
    store = Store(tmp_path)
    folder = store.begin(1)
    store.commit(folder, 1, {name: write_synced(folder / "a", "b")})
    (problem,) = problems_of(store.path(1))
    assert "which is no file of its folder" in problem


def test_extra_files_are_told_and_harmless(tmp_path):
    store = Store(tmp_path)
    commit(store, 1)
    (store.path(1) / "notes.txt").write_text("mine")
    assert problems_of(store.path(1)) == [] and extra_files(store.path(1)) == ["notes.txt"]


@pytest.mark.fault("S5")
@pytest.mark.parametrize("text", ["", "step-1", "../step-00000001", "step-00000001/..", "\0", "step-" + "9" * 50])
def test_a_pointer_that_names_no_step_names_nothing(tmp_path, text):
    (tmp_path / LATEST).write_text(text)
    assert Store(tmp_path).pointed(LATEST) is None


@pytest.mark.fault("R7")
def test_retention_keeps_the_last_the_permanent_and_what_is_pointed_to(tmp_path):
    store = Store(tmp_path)
    for step in range(1, 8):
        commit(store, step)
        if step == 2:
            store.point(BEST, 2)
        store.retire(keep_last=2, permanent=[3])
    assert store.steps() == [2, 3, 6, 7]
    assert store.retire(keep_last=None, permanent=[]) == []


@pytest.mark.fault("R7")
def test_a_damaged_newer_one_does_not_count_among_the_last(tmp_path):
    store = Store(tmp_path)
    for step in (2, 4, 6, 8):
        commit(store, step)
    (store.path(8) / ".metadata").unlink()
    commit(store, 7)  # after falling back to 6
    store.retire(keep_last=2, permanent=[])
    assert whole(store) == [6, 7]


CRASH = """
import os, sys
from pathlib import Path
from scaling.checkpoint import store as module

points = iter(range(10**6))
def crashing(function):
    def call(*arguments, **settings):
        if next(points) == crash_at:
            os._exit(9)
        result = function(*arguments, **settings)
        if next(points) == crash_at:
            os._exit(9)
        return result
    return call

crash_at = int(sys.argv[2])
for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
    setattr(os, name, crashing(getattr(os, name)))
store = module.Store(Path(sys.argv[1]))
store.clean()
folder = store.begin(3)
files = {name: module.write_synced(folder / name, name * 100) for name in ("__0_0.distcp", "__1_0.distcp", ".metadata")}
store.commit(folder, 3, files)
store.point("best", 3)
store.retire(1, [])
print(next(points))
"""


def test_a_crash_at_any_point_of_a_commit_leaves_a_whole_checkpoint(tmp_path):
    """Before and after every sync, rename and deletion, one after the other until none is left."""
    point, seen = 0, set()
    while True:
        store = Store(tmp_path / str(point))
        for step in (1, 2):
            commit(store, step, {"a": "b"})
        command = [sys.executable, "-c", CRASH, str(store.folder), str(point)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        good = whole(store)
        assert good == store.steps(), f"point {point}: a folder with a final name is not whole"
        assert good[-1] in (2, 3), f"point {point}: {good}"
        assert store.pointed(LATEST) in good and store.pointed(BEST) in (None, *good)
        seen.add(tuple(good))
        store.clean()
        assert sorted(p for p in os.listdir(store.folder) if p.startswith(".")) == []
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        point += 1
    assert point > 40 and {(1, 2), (1, 2, 3), (3,)} <= seen


@pytest.mark.fault("R4")
def test_files_are_synced_before_the_rename_and_the_folders_around_it(tmp_path, monkeypatch):
    """The order that a loss of power asks for; the loss itself cannot be had here."""
    events = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real["fsync"](descriptor)

    def rename(source, target):
        events.append(("rename", os.path.basename(target)))
        real["rename"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    store = Store(tmp_path / "checkpoints")
    folder = store.begin(5)
    records = {name: write_synced(folder / name, "x") for name in ("a", "b")}
    store.commit(folder, 5, records)
    names = [what for what in events if what[1] not in ("latest",) and "pointer" not in what[1]]
    renamed = names.index(("rename", "step-00000005"))
    before, after = names[:renamed], names[renamed + 1 :]
    assert [("fsync", "a"), ("fsync", "b"), ("fsync", MANIFEST), ("fsync", folder.name)] == before
    assert after[0] == ("fsync", "checkpoints")


@pytest.mark.fault("R7")
def test_a_thousand_sequences_of_saves_crashes_and_clean_ups_never_lose_the_last_whole_one(tmp_path):
    draw = random.Random(7)
    for sequence in range(1000):
        store, committed = Store(tmp_path / str(sequence)), 0
        keep, permanent = draw.randint(1, 3), {draw.randint(1, 12)}
        for step in range(1, draw.randint(2, 8)):
            action = draw.choice(["save", "save", "killed", "best", "clean"])
            if action in ("save", "best"):
                folder = store.begin(step)
                store.commit(folder, step, {})
                committed = step
                if action == "best":
                    store.point(BEST, step)
                store.retire(keep, permanent)
            elif action == "killed":
                (store.begin(step) / "__0_0.distcp").write_text("half")
            else:
                store.clean()
            steps = store.steps()
            if committed:
                assert steps[-1] == committed == store.pointed(LATEST)
                assert len(steps) >= 1 and (store.pointed(BEST) or committed) in steps


def test_going_back_sets_later_ones_aside(tmp_path):
    store = Store(tmp_path)
    for step in (1, 2, 3):
        commit(store, step)
    store.point(BEST, 2)
    moved = store.set_aside(1)
    assert store.steps() == [1] and len(moved) == 2 and all(path.is_dir() for path in moved)
    assert store.pointed(LATEST) is None and store.pointed(BEST) is None


def test_the_manifest_is_json_that_others_can_read(tmp_path):
    store = Store(tmp_path)
    commit(store, 1, {"a": "b"})
    manifest = json.loads((store.path(1) / MANIFEST).read_text())
    assert manifest["step"] == 1 and manifest["files"]["a"]["bytes"] == 3
