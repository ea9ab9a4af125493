"""One checkpoint's files: written by a saver, read by us and by torch alone, and refused where they are not ours."""

import fcntl
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import ROOT
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from scaling.checkpoint import files as checkpoint_files
from scaling.checkpoint import format as checkpoint_format
from scaling.checkpoint import saver as checkpoint_saver
from scaling.checkpoint.files import HashingFile
from scaling.checkpoint.format import Reader, read_state
from scaling.checkpoint.saver import Saver
from scaling.checkpoint.store import FileRecord, Store, problems_of
from scaling.engine.process import Process
from scaling.engine.protocol import FlatShard
from scaling.errors import CheckpointError

STATE = {
    "format_version": 1,
    "step": 3,
    "samples_seen": 36,
    "tokens_seen": 360,
    "global_batch": 12,
    "sequence_length": 10,
    "seed": 1,
    "skipped": [],
    "trainable": ["a"],
    "counters": {"updates": 3},
    "shapes": {"a": [10, 100]},
    "best": None,
    "data": "x",
    "origin": None,
}
DOCUMENTS = {"state.json": json.dumps(STATE), "spec.json": "{}"}


@pytest.fixture(scope="module")
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Process(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {f"{kind}/a": torch.randn(1000, generator=generator) for kind in ("master", "exp_avg", "exp_avg_sq")}
    return found | {"master/frozen": torch.randn(70, generator=generator).bfloat16(), "master/one": torch.ones(1)}


def shards(values: dict[str, torch.Tensor]) -> list[FlatShard]:
    found = []
    for key, value in values.items():
        kind, _, name = key.partition("/")
        cuts = [0, 1, 333, 700, 1000] if value.numel() == 1000 else [0, value.numel()]
        found += [FlatShard(name, kind, value.numel(), a, value[a:b]) for a, b in itertools.pairwise(cuts)]
    return found


def save(folder: Path, process: Process, *, asynchronous: bool = False, step: int = 3) -> Path:
    store = Store(folder)
    saver = Saver(store, process, asynchronous=asynchronous)
    saver.save(step, shards(tensors()), DOCUMENTS, lambda: None)
    outcome = saver.wait()
    assert outcome is not None and outcome.problem is None and outcome.bytes == 3 * 4000 + 140 + 4, outcome
    assert saver.wait() is None, "an outcome is told once"
    return store.path(step)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_read_in_any_ranges(tmp_path, process, asynchronous, monkeypatch):
    monkeypatch.setattr(checkpoint_saver, "CHUNK_BYTES", 1024)  # ranges of at most 256 values
    monkeypatch.setattr(checkpoint_format, "FILE_BYTES", 1024)
    folder = save(tmp_path, process, asynchronous=asynchronous)
    assert problems_of(folder) == [] and len(os.listdir(folder)) >= 16
    reader = Reader(folder)
    assert reader.elements == {key: value.numel() for key, value in tensors().items()}
    for key, value in tensors().items():
        for start, count in [(0, value.numel()), (0, 0), (value.numel(), 0), (17, 40), (255, 700)]:
            if start + count <= value.numel():
                found = reader.read(key, start, count)
                assert found.dtype == value.dtype and torch.equal(found, value[start : start + count])
    reader.close()
    assert reader.state["step"] == 3 and reader.state["spec"] == {}


def test_torch_alone_reads_it(tmp_path, process):
    folder = save(tmp_path / "c", process)
    dcp_to_torch_save(folder, tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt")
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[key], value) for key, value in tensors().items())


def test_no_path_of_the_machine_is_in_it(tmp_path, process):
    folder = save(tmp_path, process)
    assert all(str(tmp_path).encode() not in (folder / name).read_bytes() for name in os.listdir(folder))


def test_the_copy_is_taken_before_save_returns(tmp_path, process):
    values, store = tensors(), Store(tmp_path)
    saver = Saver(store, process, asynchronous=True)
    saver.save(1, shards(values), DOCUMENTS, lambda: None)
    for value in values.values():
        value.zero_()
    assert saver.wait().problem is None
    assert torch.equal(Reader(store.path(1)).read("master/a", 0, 1000), tensors()["master/a"])


@pytest.mark.fault("R11")
def test_a_failure_of_the_writer_is_told_and_leaves_nothing(tmp_path, process):
    (tmp_path / "file").write_text("")
    saver = Saver(Store(tmp_path / "file"), process, asynchronous=True)
    saver.save(1, shards(tensors()), DOCUMENTS, lambda: None)
    outcome = saver.wait()
    assert outcome.storage and "File exists" in outcome.problem


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 3 * 4096, 50_001])
def test_blocks_go_straight_to_the_disk_and_the_rest_follows(tmp_path, monkeypatch, length):
    monkeypatch.setattr(checkpoint_files, "_BLOCK_BYTES", 4096)
    direct, real = [], HashingFile._write_block

    def write_block(file, block, count):
        real(file, block, count)
        if count == 4096:
            direct.append(bool(fcntl.fcntl(file._raw, fcntl.F_GETFL) & os.O_DIRECT))

    monkeypatch.setattr(HashingFile, "_write_block", write_block)
    data, told = random.Random(7).randbytes(length), []
    with HashingFile(tmp_path / "a", told.append) as file:
        for start in range(0, length, 700):
            assert file.bytes == start
            file.write(memoryview(data)[start : start + 700])
    assert (tmp_path / "a").read_bytes() == data
    assert file.record == FileRecord(length, hashlib.sha256(data).hexdigest())
    assert told == [4096] * (length // 4096) and direct == [can_pass_the_cache(tmp_path)] * (length // 4096)


def can_pass_the_cache(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_a_writer_that_holds_back_hurries_when_waited_for(tmp_path, process, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_BLOCK_BYTES", 4096)
    saver, store = Saver(Store(tmp_path), process, asynchronous=True), Store(tmp_path)
    saver.save(1, shards(tensors()), DOCUMENTS, lambda: None, spread_s=1000.0)
    time.sleep(0.5)
    assert saver.poll() is None and store.steps() == []
    outcome = saver.wait()
    assert outcome.problem is None and 0.2 < outcome.paused <= outcome.seconds < 60
    assert problems_of(store.path(1)) == []


FULL = """
import resource, signal, sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from test_checkpoint import *
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
process = Process(0, 1, 0, 1, torch.device("cpu"))
folder = Path(sys.argv[1])
checkpoint_files._BLOCK_BYTES = int(sys.argv[3])
save(folder, process, step=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (int(sys.argv[2]), resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    saver = Saver(Store(folder), process, asynchronous=True)
    saver.save(2, shards(tensors()), DOCUMENTS, lambda: None)
    outcome = saver.wait()
    print(outcome.storage, outcome.problem, Store(folder).steps(), sorted(os.listdir(folder)), sep="|")
"""


@pytest.mark.fault("R11")
@pytest.mark.parametrize("limit", [100, 5000, 14000])
@pytest.mark.parametrize("block", [4096, 4 << 20])
def test_a_disk_that_fills_within_a_save_is_told_and_leaves_the_earlier_one(tmp_path, limit, block):
    """A limit to the size of files stands for the disk: the write stops in the midst of a tensor, or of the index."""
    words = [sys.executable, "-c", FULL, tmp_path, str(limit), str(block)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, passed = (line.split("|") for line in done.stdout.splitlines())
    assert refused[0] == "True" and refused[1].startswith("File too large on rank 0"), refused
    assert refused[2:] == ["[1]", "['latest', 'step-00000001']"]
    assert passed[:3] == ["False", "None", "[1, 2]"]
    assert problems_of(tmp_path / "step-00000001") == [] == problems_of(tmp_path / "step-00000002")


# ---------------------------------------------------------------- files that somebody else has made


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


def change_index(folder: Path, change) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index = change(index) or index
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def change_chunk(folder: Path, change) -> None:
    """Replace the stored bytes of `master/one`."""

    def move(index):
        (key,) = (key for key in index.storage_data if key.fqn == "master/one")
        (folder / "evil.distcp").write_bytes(data := change())
        index.storage_data[key].relative_path = "evil.distcp"
        index.storage_data[key].offset, index.storage_data[key].length = 0, len(data)

    change_index(folder, move)


def saved_by_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def bomb() -> bytes:
    """A compressed tensor file: 64 MB in some kB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved_by_torch(torch.zeros(1)))) as source, zipfile.ZipFile(buffer, "w") as out:
        for entry in source.infolist():
            data = bytes(64 << 20) if entry.filename.endswith("data/0") else source.read(entry)
            out.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def relocate(path: str):
    def change(index):
        for place in index.storage_data.values():
            place.relative_path = path

    return change


def lengthen(index):
    entry = index.state_dict_metadata["master/one"]
    entry.size = torch.Size([10**15])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([10**15]))]


def link_out(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder.parent / "outside")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "outside")


EVIL = {
    "index-runs-code": lambda folder, evil: (folder / ".metadata").write_bytes(pickle.dumps(evil)),
    "index-hides-code": lambda folder, evil: change_index(
        folder, lambda index: setattr(index, "planner_data", {"x": evil})
    ),
    "index-is-garbage": lambda folder, _: (folder / ".metadata").write_bytes(b"\x80\x04garbage"),
    "index-is-a-list": lambda folder, _: (folder / ".metadata").write_bytes(pickle.dumps([1])),
    "index-by-dotted-name": lambda folder, _: (folder / ".metadata").write_bytes(
        b"\x80\x04\x8c\x05torch\x8c\x13serialization.os.sys\x93."
    ),
    "tensor-runs-code": lambda folder, evil: change_chunk(folder, lambda: saved_by_torch(evil)),
    "tensor-of-another-type": lambda folder, _: change_chunk(folder, lambda: saved_by_torch(torch.ones(1).long())),
    "tensor-of-another-shape": lambda folder, _: change_chunk(folder, lambda: saved_by_torch(torch.ones(2))),
    "tensor-is-no-tensor": lambda folder, _: change_chunk(folder, lambda: saved_by_torch({"a": 1})),
    "tensor-is-a-bomb": lambda folder, _: change_chunk(folder, bomb),
    "tensor-is-a-plain-pickle": lambda folder, evil: change_chunk(folder, lambda: pickle.dumps(evil)),
    "path-absolute": lambda folder, _: change_index(folder, relocate("/etc/passwd")),
    "path-upwards": lambda folder, _: change_index(folder, relocate("../../x")),
    "path-is-a-link": lambda folder, _: link_out(folder),
    "size-is-huge": lambda folder, _: change_index(folder, lengthen),
    "chunk-missing": lambda folder, _: change_index(
        folder, lambda index: index.state_dict_metadata["master/a"].chunks.pop()
    ),
    "chunk-twice": lambda folder, _: change_index(
        folder,
        lambda index: index.state_dict_metadata["master/a"].chunks.__setitem__(
            1, index.state_dict_metadata["master/a"].chunks[0]
        ),
    ),
    "state-is-a-pickle": lambda folder, evil: (folder / "state.json").write_bytes(pickle.dumps(evil)),
    "state-is-nested": lambda folder, _: (folder / "state.json").write_text("[" * 100_000),
    "state-of-other-types": lambda folder, _: (folder / "state.json").write_text(json.dumps(STATE | {"step": "../x"})),
    "state-of-the-future": lambda folder, _: (folder / "state.json").write_text(
        json.dumps(STATE | {"format_version": 99})
    ),
    "state-is-missing": lambda folder, _: (folder / "state.json").unlink(),
}


@pytest.mark.fault("S5")
@pytest.mark.parametrize("case", EVIL)
def test_a_file_of_another_make_is_refused_in_one_line_and_runs_nothing(tmp_path, process, case):
    folder = save(tmp_path / "c", process)
    EVIL[case](folder, Evil(tmp_path / "sentinel"))
    with pytest.raises(CheckpointError) as refusal:
        reader = Reader(folder)
        for key, elements in reader.elements.items():
            assert elements < 10**6 or key, "a size is compared with the model's before memory is taken"
            reader.read(key, 0, min(elements, 1000))
    assert refusal.value.code == 5 and "\n" not in str(refusal.value)
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.fault("S5 control")
def test_the_planted_code_does_run_where_pickles_are_believed(tmp_path, process):
    folder = save(tmp_path / "c", process)
    EVIL["index-hides-code"](folder, Evil(tmp_path / "sentinel"))
    (tmp_path / "sentinel").rmdir() if (tmp_path / "sentinel").exists() else None
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "sentinel").is_dir()


def test_state_alone_needs_no_tensors(tmp_path, process):
    folder = save(tmp_path, process)
    (folder / ".metadata").unlink()
    assert read_state(folder)["counters"] == {"updates": 3}
