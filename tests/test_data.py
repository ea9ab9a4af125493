"""The data package: order, windows, caches, made sequences and the loader."""

import errno
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scaling.data import loader, text, tokenizer
from scaling.data.build import build_datasets
from scaling.data.dataset import IGNORED, MicroBatch, from_windows
from scaling.data.hashing import derive, derive_each
from scaling.data.loader import step_batches, validation_batches
from scaling.data.order import sample_indices
from scaling.data.synthetic import SyntheticDataset
from scaling.data.windows import WindowDataset
from scaling.errors import StorageError, UserError
from scaling.spec.sections import Spec

CPU = torch.device("cpu")


def make_spec(data: dict, vocab_size: int = 256, seed: int = 1337) -> Spec:
    model = dict(
        kind="decoder",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4096,
    )
    batch = dict(global_batch_size=8, micro_batch_size=8)
    whole = dict(name="t", seed=seed, model=model, data=data, batch=batch, optimizer=dict(lr=1e-3), max_steps=1)
    return Spec.model_validate_json(json.dumps(whole))


def text_data(folder: Path, **settings) -> dict:
    whole = dict(kind="text", train=[f"{folder}/corpus/**/*.txt"], validation=0, sequence_length=4)
    return whole | dict(cache=str(folder / "cache")) | settings


def write_corpus(folder: Path, **texts: str) -> None:
    (folder / "corpus").mkdir(exist_ok=True)
    for name, content in texts.items():
        (folder / "corpus" / f"{name}.txt").write_bytes(content.encode())


def stream_of(dataset) -> list[int]:
    """The tokens of all windows, put together again."""
    batch = dataset.read(np.arange(len(dataset)))
    return [int(batch.inputs[0, 0]), *batch.targets.flatten().tolist()]


class Numbers:
    """A dataset whose sample i is [i] -> [i], as samples without content."""

    bytes_per_token = None

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads = 0

    def __len__(self) -> int:
        return self.size

    def read(self, indices: np.ndarray) -> MicroBatch:
        self.reads += 1
        return from_windows(np.stack([indices, indices], axis=1).astype(np.int64))


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_each_epoch_is_a_permutation_of_its_own(size: int) -> None:
    epochs = sample_indices(0, 3 * size, size, seed=7).reshape(3, size)
    assert epochs.dtype == np.int64
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size >= 16:
        assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
        assert (epochs[0] != sample_indices(0, size, size, seed=8)).any()


@pytest.mark.parametrize("words", [(0,), (7, 11), (2**64 - 1, 3), (2**63, 2**64 - 1, 5), (-1, 2)])
def test_a_key_is_the_same_by_python_and_by_numpy(words: tuple[int, ...]) -> None:
    """Of a single number Python's own arithmetic is the faster one."""
    key = 0
    for word in words:
        key = int(derive_each(key, np.array([word % 2**64], dtype=np.uint64))[0])
    assert derive(*words) == key


def test_order_never_changes_silently() -> None:
    """A checkpoint counts on it: another order would show some samples twice and others never."""
    assert sample_indices(0, 10, 10, seed=7).tolist() == [6, 0, 7, 4, 3, 8, 2, 9, 1, 5]
    assert sample_indices(10**12 - 3, 6, 10**12, seed=7).tolist() == [
        788939186960,
        525509936496,
        889035531101,
        880644773800,
        718585800417,
        589587876002,
    ]


def test_order_of_large_sets_is_even_and_quick() -> None:
    started = time.monotonic()
    indices = sample_indices(2**61, 100_000, 10**12, seed=1)
    assert time.monotonic() - started < 2
    assert len(set(indices.tolist())) == 100_000
    tenths = np.bincount(indices * 10 // 10**12, minlength=10)
    assert abs(tenths - 10_000).max() < 500  # five standard deviations


def test_order_of_small_sets_has_no_favourite() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in sample_indices(0, 3 * 6000, 3, seed=5).reshape(-1, 3).tolist():
        counts[tuple(epoch)] = counts.get(tuple(epoch), 0) + 1
    assert len(counts) == 6 and abs(np.array(list(counts.values())) - 1000).max() < 150


@pytest.mark.parametrize("size", [1, 13, 64, 65, 2**61 + 5])
def test_any_part_of_the_order_is_the_same(size: int) -> None:
    """Few samples are looked up one by one, many together."""
    whole = sample_indices(0, 100, size, seed=3)
    for first, count in [(0, 1), (12, 2), (13, 13), (25, 60), (62, 8), (99, 1), (50, 0)]:
        assert sample_indices(first, count, size, seed=3).tolist() == whole[first : first + count].tolist()


# ---------------------------------------------------------------- loader


def samples_of_step(world_size: int, micro_batch: int, accumulation: int, first: int, last: int, size: int) -> list:
    """For each step what all ranks read, in order: micro-steps outside, ranks inside."""
    ranks = [
        list(
            step_batches(
                Numbers(size),
                seed=11,
                micro_batch=micro_batch,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                first_samples=range(12 * first, 12 * last, 12),
                device=CPU,
            )
        )
        for rank in range(world_size)
    ]
    steps = []
    for step in range(last - first):
        batches = [ranks[rank][step][a] for a in range(accumulation) for rank in range(world_size)]
        assert all(batch.inputs.shape == (micro_batch, 1) for batch in batches)
        steps.append(torch.cat([batch.inputs for batch in batches]).flatten().tolist())
    return steps


@pytest.mark.parametrize(
    "world_size, micro_batch, accumulation", [(1, 3, 4), (2, 3, 2), (4, 3, 1), (3, 2, 2), (2, 1, 6)]
)
def test_samples_do_not_depend_on_the_world_size(world_size: int, micro_batch: int, accumulation: int) -> None:
    size = 29  # steps of 12 cross the border of an epoch in their midst
    expected = sample_indices(0, 12 * 8, size, seed=11).reshape(8, 12).tolist()
    assert samples_of_step(world_size, micro_batch, accumulation, 0, 8, size) == expected
    assert samples_of_step(world_size, micro_batch, accumulation, 5, 8, size) == expected[5:]


def iterate(dataset, **changes):
    settings = dict(seed=1, micro_batch=2, accumulation=2, rank=0, world_size=1, first_samples=itertools.count(0, 4))
    return step_batches(dataset, **(settings | changes), device=CPU)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def reads_at_rest(dataset: Numbers) -> int:
    """How often it was read, once nobody goes on reading."""
    before, deadline = -1, time.monotonic() + 5
    while dataset.reads != before and time.monotonic() < deadline:
        before = dataset.reads
        time.sleep(0.2)
    return dataset.reads


def test_reads_ahead_and_stops_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_MOST_BYTES", 1)  # any step is large, and goes by itself
    dataset = Numbers(100)
    batches = iterate(dataset)
    assert len(next(batches)) == 2
    assert reads_at_rest(dataset) == 8  # this step, two that wait, and one in hand
    assert len(readers()) == 1
    batches.close()
    assert not readers()


def test_small_steps_are_handed_over_together() -> None:
    dataset = Numbers(1000)
    batches = iterate(dataset)
    seen: list[int] = []
    for _ in range(3 * loader._MOST_STEPS + 32):
        next(batches)
        time.sleep(0.01)
        seen.append(dataset.reads)
    batches.close()
    assert len(set(seen[-32:])) < 8  # one at a time it would have been read after each
    assert seen[-1] // 2 - len(seen) <= 4 * loader._MOST_STEPS  # the rest of a bundle, two that wait, and one in hand


def test_a_step_that_is_waited_for_is_handed_over_at_once() -> None:
    class Slow(Numbers):
        may = threading.Semaphore(0)

        def read(self, indices: np.ndarray) -> MicroBatch:
            assert self.may.acquire(timeout=5), "the steps that were read are kept back"
            return super().read(indices)

    dataset = Slow(100)
    batches = iterate(dataset)
    for _ in range(20):
        dataset.may.release(2)
        next(batches)
    batches.close()


def test_thread_ends_with_the_steps() -> None:
    assert len(list(iterate(Numbers(5), first_samples=range(12, 28, 4)))) == 4
    assert list(iterate(Numbers(5), first_samples=[])) == []
    assert not readers()


def test_an_error_of_the_thread_surfaces_with_its_type() -> None:
    class Broken(Numbers):
        def read(self, indices: np.ndarray) -> MicroBatch:
            if self.reads == 4:
                raise UserError("token 7 is wrong")
            return super().read(indices)

    batches = iterate(Broken(9))
    next(batches)
    next(batches)
    with pytest.raises(UserError, match="token 7 is wrong"):
        next(batches)
    assert not readers()


def test_a_process_that_forgets_to_close_ends() -> None:
    program = (
        "import torch\nfrom scaling.data.loader import step_batches\n"
        "from scaling.data.synthetic import SyntheticDataset\n"
        "steps = step_batches(SyntheticDataset(1, 0, 9, 4, 16), seed=1, micro_batch=2, accumulation=1, rank=0,"
        " world_size=1, first_samples=range(0, 10**9, 2), device=torch.device('cpu'))\n"
        "next(steps)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("samples, size", [(10, 100), (100, 10), (12, 12), (1, 5)])
def test_validation_takes_each_sample_once(world_size: int, samples: int, size: int) -> None:
    ranks = [
        list(validation_batches(Numbers(size), samples=samples, micro_batch=3, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    targets = torch.cat([batch.targets for batches in ranks for batch in batches]).flatten()
    assert all(batch.inputs.shape == (3, 1) and batch.inputs.min() >= 0 for batches in ranks for batch in batches)
    # Distinct, and the same ones whatever the world size.
    chosen = sample_indices(0, min(samples, size), size, seed=0).tolist()
    assert sorted(targets[targets != IGNORED].tolist()) == sorted(set(chosen))
    assert len(chosen) == min(samples, size)


# ---------------------------------------------------------------- tokens


def token_data(folder: Path, **settings) -> dict:
    return dict(kind="tokens", train=[f"{folder}/*.npy"], validation=0, sequence_length=4) | settings


def test_windows_cross_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(0, 6, dtype=np.uint16))
    np.save(tmp_path / "b.npy", np.arange(6, 7, dtype=np.int64))
    np.save(tmp_path / "c.npy", np.arange(0, dtype=np.int32))
    np.save(tmp_path / "d.npy", np.arange(7, 15, dtype=np.uint64))
    dataset, validation = build_datasets(make_spec(token_data(tmp_path)))
    assert validation is None and dataset.bytes_per_token is None
    assert len(dataset) == 3  # 15 tokens: 1 + 3 x 4, and two that are dropped
    batch = dataset.read(np.array([2, 0, 1]))
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.targets.tolist() == [[9, 10, 11, 12], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_bin_files_with_and_without_header(tmp_path: Path) -> None:
    np.arange(10, dtype="<u4").tofile(tmp_path / "plain.bin")
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 7, 10
    (tmp_path / "with.bin").write_bytes(header.tobytes() + np.arange(10, 20, dtype="<u4").tobytes())
    (tmp_path / "empty.bin").write_bytes(b"")
    data = token_data(tmp_path, train=[f"{tmp_path}/*.bin"], dtype="uint32", sequence_length=19)
    assert stream_of(build_datasets(make_spec(data))[0]) == list(range(20))


def test_held_out_windows_share_no_token(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(103))
    train, validation = build_datasets(make_spec(token_data(tmp_path, validation=0.2)))
    assert validation is not None and len(validation) == 5  # of 25
    seen, held_out = set(stream_of(train)), set(stream_of(validation))
    assert not seen & held_out and max(seen) < min(held_out)
    assert max(held_out) == 102


def test_validation_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9))
    np.save(tmp_path / "b.npy", np.arange(100, 105))
    files = [f"{tmp_path}/a.npy"], [f"{tmp_path}/b.npy"]
    train, validation = build_datasets(make_spec(token_data(tmp_path, train=files[0], validation=files[1])))
    assert validation is not None
    assert (stream_of(train), stream_of(validation)) == (list(range(9)), list(range(100, 105)))
    with pytest.raises(UserError, match=r"must not share files with data.train, but .*a\.npy is in both"):
        build_datasets(make_spec(token_data(tmp_path, validation=files[0])))


def test_ids_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(8))
    np.save(tmp_path / "b.npy", np.array([1, 2, 999, 3, 4]))
    dataset, _ = build_datasets(make_spec(token_data(tmp_path)))
    dataset.read(np.array([0]))
    with pytest.raises(UserError, match=r"0 .. 255 .* token 2 of .*b\.npy is 999"):
        dataset.read(np.array([0, 2]))
    np.save(tmp_path / "b.npy", np.array([1, 2, 3, -5, 4]))
    with pytest.raises(UserError, match=r"token 3 of .*b\.npy is -5"):
        build_datasets(make_spec(token_data(tmp_path)))[0].read(np.array([2]))


def test_ignored_tokens_are_masked_as_targets_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 0, 2, 0, 3]))
    batch = build_datasets(make_spec(token_data(tmp_path, ignore_token_id=0)))[0].read(np.array([0]))
    assert batch.inputs.tolist() == [[1, 0, 2, 0]]
    assert batch.targets.tolist() == [[IGNORED, 2, IGNORED, 3]]


def test_bad_token_files(tmp_path: Path) -> None:
    def message(**settings) -> str:
        with pytest.raises(UserError) as caught:
            build_datasets(make_spec(token_data(tmp_path, **settings)))
        return str(caught.value)

    assert "`data.train` must match files, but" in message() and str(Path.cwd()) in message()
    np.save(tmp_path / "short.npy", np.arange(4))
    assert "must hold at least 5 tokens" in message() and "but holds 4" in message()
    np.save(tmp_path / "short.npy", np.arange(5))
    assert "must leave at least one sample to train on, but holds out 1 of 1" in message(validation=0.5)
    np.save(tmp_path / "short.npy", np.zeros((2, 5)))
    assert "but holds float64 of shape (2, 5)" in message()
    (tmp_path / "short.npy").write_bytes(b"not numpy")
    assert "must be a whole .npy file" in message()
    (tmp_path / "odd.bin").write_bytes(b"123")
    assert "whole number of uint16 values, but has 3 bytes" in message(train=[f"{tmp_path}/odd.bin"])
    assert "must end in .npy or .bin" in message(train=[__file__])


# ---------------------------------------------------------------- text


def test_bytes_end_each_document_with_zero(tmp_path: Path) -> None:
    write_corpus(tmp_path, b="déf", a="abc\r\n", c="")
    dataset, _ = build_datasets(make_spec(text_data(tmp_path, sequence_length=11)))
    assert bytes(stream_of(dataset)) == b"abc\r\n\0d\xc3\xa9f\0\0"
    assert dataset.bytes_per_token == 9 / 12


def test_relative_globs_are_sorted_and_files_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, b="bb", a="aa")
    monkeypatch.chdir(tmp_path)
    data = text_data(tmp_path, train=["corpus/b*", "**/*.txt", "./corpus/a.txt"], cache="c", sequence_length=5)
    assert bytes(stream_of(build_datasets(make_spec(data))[0])) == b"bb\0aa\0"
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == [".bin", ".json", ".lock"]


def test_split_follows_content_and_not_names(tmp_path: Path) -> None:
    contents = [f"document {number} {'x' * 20}" for number in range(40)]

    def held_out(names: list[str], fraction: float) -> set[str]:
        (tmp_path / "corpus").mkdir(exist_ok=True)
        for path in (tmp_path / "corpus").iterdir():
            path.unlink()
        write_corpus(tmp_path, **dict(zip(names, contents * 2, strict=True)))
        train, validation = build_datasets(make_spec(text_data(tmp_path, validation=fraction, sequence_length=1)))
        assert validation is not None
        documents = [set(bytes(stream_of(part)).split(b"\0")) - {b""} for part in (train, validation)]
        assert not documents[0] & documents[1]  # so both copies of a document are on one side
        assert documents[0] | documents[1] == {content.encode() for content in contents}
        return {content.decode() for content in documents[1]}

    names = [f"n{number:02}" for number in range(80)]
    fifth = held_out(names, 0.2)
    assert 2 <= len(fifth) <= 16
    assert held_out(names[::-1], 0.2) == fifth
    one = held_out(names, 1e-6)
    assert len(one) == 1 and one < fifth


def test_the_end_of_a_lone_file_is_held_out(tmp_path: Path) -> None:
    write_corpus(tmp_path, a="".join(chr(97 + n % 26) for n in range(400)))
    train, validation = build_datasets(make_spec(text_data(tmp_path, validation=0.1)))
    assert validation is not None and (len(train), len(validation)) == (89, 10)
    assert validation.bytes_per_token == train.bytes_per_token == 400 / 401


def entries(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir() if path.suffix == ".bin"}


def test_cache_is_kept_rebuilt_and_renewed(tmp_path: Path) -> None:
    write_corpus(tmp_path, a="first", b="second")
    spec = make_spec(text_data(tmp_path))
    before = stream_of(build_datasets(spec)[0])
    first = entries(tmp_path)
    os.utime(tmp_path / "corpus" / "a.txt")
    (tmp_path / "corpus" / "a.txt").rename(tmp_path / "corpus" / "a2.txt")
    assert stream_of(build_datasets(spec)[0]) == before and entries(tmp_path) == first  # equal content: kept

    (name,) = first
    file = tmp_path / "cache" / name
    os.truncate(file, file.stat().st_size - 2)
    assert stream_of(build_datasets(spec)[0]) == before
    assert list(entries(tmp_path)) == [name] and entries(tmp_path) != first  # cut short: rebuilt
    file.with_suffix(".json").write_text("{")
    assert stream_of(build_datasets(spec)[0]) == before  # sidecar broken: rebuilt

    write_corpus(tmp_path, b="another")
    assert bytes(stream_of(build_datasets(spec)[0])).startswith(b"first\0anoth")
    assert len(entries(tmp_path)) == 2  # other content: another entry


def build_and_report(spec: Spec, answers) -> None:
    answers.put(stream_of(build_datasets(spec)[0]))


def test_two_processes_tokenise_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, a="text of a", b="text of b")

    def slow_encode(texts):
        with open(tmp_path / "calls", "a") as calls:
            calls.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return encode(texts)

    encode = tokenizer._bytes_of
    monkeypatch.setattr(tokenizer, "_bytes_of", slow_encode)
    context = multiprocessing.get_context("fork")  # inherits the slow tokenizer
    answers = context.Queue()
    spec = make_spec(text_data(tmp_path))
    workers = [context.Process(target=build_and_report, args=(spec, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    streams = [answers.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert streams[0] == streams[1] and bytes(streams[0]).startswith(b"text of a\0")
    assert len((tmp_path / "calls").read_text().split()) == 1


def test_a_process_killed_while_tokenising_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, a="text of a", b="text of b")
    spec = make_spec(text_data(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_bytes_of", lambda texts: os.kill(os.getpid(), signal.SIGKILL))
        worker = multiprocessing.get_context("fork").Process(target=build_datasets, args=(spec,))
        worker.start()
        worker.join(30)
        assert worker.exitcode == -signal.SIGKILL
    assert list((tmp_path / "cache").glob("*.tmp"))
    assert bytes(stream_of(build_datasets(spec)[0])).startswith(b"text of a\0")
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_cache_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, a="some text")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"`data.cache` must be a folder .*file/below fails: Not a directory"):
        build_datasets(make_spec(text_data(tmp_path, cache=str(tmp_path / "file" / "below"))))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free space") as caught:
        build_datasets(make_spec(text_data(tmp_path)))
    assert caught.value.code == 6
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_bad_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(**settings) -> str:
        with pytest.raises(UserError) as caught:
            build_datasets(make_spec(text_data(tmp_path, **settings)))
        assert not isinstance(caught.value, StorageError)
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert f'`data.train` must match files, but "x/**" matches none in {tmp_path}' in message(train=["x/**"])
    write_corpus(tmp_path, a="abc")
    assert "`data.train` must hold at least 5 tokens" in message() and "but holds 4" in message()
    assert '`data.validation` must match files, but "y"' in message(validation=["y"])
    write_corpus(tmp_path, b="abc")
    assert "must leave files to train on, but 0.5 holds out all 2" in message(validation=0.5)
    (tmp_path / "corpus" / "b.txt").write_bytes(b"latin \xe9")
    assert "b.txt must be UTF-8, but is not at byte 6" in message()
    documents = text._look_at([tmp_path / "corpus" / "a.txt"])
    write_corpus(tmp_path, a="changed")
    with pytest.raises(UserError, match="must not change while it is read"):
        text._read(documents[0])
    (tmp_path / "corpus" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt must be readable, but is not: No such file"):
        text._read(documents[0])


def test_standard_library(tmp_path: Path) -> None:
    data = text_data(tmp_path, train=["python-stdlib"], validation=0.05, sequence_length=256)
    train, validation = build_datasets(make_spec(data))
    assert validation is not None and len(train) > 20_000
    assert 0.01 < len(validation) / len(train) < 0.15
    assert train.bytes_per_token is not None and 0.99 < train.bytes_per_token < 1
    batch = train.read(np.array([0, len(train) - 1]))
    assert int(batch.inputs.min()) >= 0 and int(batch.inputs.max()) < 256


# ---------------------------------------------------------------- tokenizer.json


def write_tokenizer(path: Path, special: list[str]) -> int:
    """Saves a tokenizer that cuts at 2 tokens, as a fine-tuning run may leave it; returns its number of tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator(["the cat and the dog and the cow"] * 4, trainer)
    made.enable_truncation(2)
    made.save(str(path))
    return made.get_vocab_size()


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", None])
def test_tokenizer_json(tmp_path: Path, end: str | None) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    vocabulary = write_tokenizer(path, ["<pad>"] + ([end] if end else []))
    texts = ["the cat and the dog", "the cow and the cat and the dog"]
    write_corpus(tmp_path, a=texts[0], b=texts[1])
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.no_truncation()
    ending = [inner.token_to_id(end)] if end else []
    expected = [token for content in texts for token in inner.encode(content).ids + ending]
    data = text_data(tmp_path, tokenizer=str(path), sequence_length=len(expected) - 1)
    dataset, _ = build_datasets(make_spec(data, vocab_size=vocabulary))
    assert stream_of(dataset) == expected
    assert dataset.bytes_per_token == pytest.approx(sum(map(len, texts)) / len(expected))
    with pytest.raises(UserError, match=rf"`model.vocab_size` must be at least {vocabulary} .* is {vocabulary - 1}"):
        build_datasets(make_spec(data, vocab_size=vocabulary - 1))


def test_bad_tokenizers(tmp_path: Path) -> None:
    write_corpus(tmp_path, a="text")
    with pytest.raises(UserError, match=r'must be "bytes" or the path of a tokenizer.json, but .*none.json cannot'):
        build_datasets(make_spec(text_data(tmp_path, tokenizer=str(tmp_path / "none.json"))))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"must be a Hugging Face tokenizer\.json"):
        build_datasets(make_spec(text_data(tmp_path, tokenizer=str(tmp_path / "broken.json"))))


# ---------------------------------------------------------------- synthetic


def synthetic(vocab_size: int = 512, **settings):
    return build_datasets(make_spec(dict(kind="synthetic", sequence_length=64) | settings, vocab_size=vocab_size))


def test_synthetic_samples_depend_on_seed_stream_and_index_alone() -> None:
    train, validation = synthetic(masked_fraction=0.3, samples=10**9)
    assert validation is not None and (len(train), len(validation)) == (10**9, 256)
    together = train.read(np.array([5, 999_999_999]))
    for row, index in enumerate([5, 999_999_999]):
        alone = train.read(np.array([index]))
        assert torch.equal(alone.inputs[0], together.inputs[row])
        assert torch.equal(alone.targets[0], together.targets[row])
    assert not torch.equal(together.inputs[0], validation.read(np.array([5])).inputs[0])
    assert not torch.equal(together.inputs[0], SyntheticDataset(1, 0, 10, 64, 512).read(np.array([5])).inputs[0])
    assert synthetic(validation_samples=0)[1] is None


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 210, 256, 50304])
def test_synthetic_sequences_follow_few_rules(vocab_size: int) -> None:
    modulus = min(vocab_size, 256)
    batch = SyntheticDataset(7, 0, 100, 64, vocab_size).read(np.arange(100))
    assert int(batch.inputs.min()) >= 0 and int(batch.inputs.max()) < modulus
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    factors = [a for a in range(1, 10**5, 4) if math.gcd(a, modulus) == 1][:4]
    follows = [(factor * batch.inputs + 2 * rule + 1) % modulus == batch.targets for rule, factor in enumerate(factors)]
    best = torch.stack([matches.float().mean(dim=1) for matches in follows]).amax(dim=0)
    assert float(best.mean()) > 0.8 and float(best.min()) > 0.5  # (15/16)^2 = 0.88 are free of noise


def test_terms_that_are_known_before_are_those_of_each_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(101, dtype=np.uint16) % 7)
    tokens = {"kind": "tokens", "train": [str(tmp_path / "a.npy")], "validation": 0, "sequence_length": 8}
    for data, known in (
        ({"kind": "synthetic", "sequence_length": 8}, 8),
        ({"kind": "synthetic", "sequence_length": 8, "masked_fraction": 0.5}, None),
        (tokens, 8),
        (tokens | {"ignore_token_id": 3}, None),
    ):
        dataset, _ = build_datasets(make_spec(data))
        found = {dataset.read(np.array([index])).terms for index in range(12)}
        assert dataset.terms_per_sample == known and (found == {8} if known else len(found) > 1)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.8, 0.99])
def test_masked_shares_vary_around_their_mean(fraction: float) -> None:
    plain = SyntheticDataset(7, 0, 2000, 64, 256).read(np.arange(2000))
    batch = SyntheticDataset(7, 0, 2000, 64, 256, fraction).read(np.arange(2000))
    assert torch.equal(batch.inputs, plain.inputs)
    masked = batch.targets == IGNORED
    assert torch.equal(batch.targets[~masked], plain.targets[~masked])
    shares = masked.float().mean(dim=1)
    assert float(shares.mean()) == pytest.approx(fraction, abs=0.02)
    assert float(shares.max()) < 1  # one target is left at least
    assert float(shares.std()) > 0.3 * min(fraction, 1 - fraction)


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\nlines", "source": "x"}\n')
    data = {"kind": "text", "train": [str(path)], "validation": 0, "sequence_length": 4, "cache": str(tmp_path / "c")}
    train, _ = build_datasets(make_spec(data))
    assert isinstance(train, WindowDataset)
    assert bytes(train.stream.read(0, len(train.stream)).tolist()) == b"one\0two\nlines\0"
    with path.open("a") as file:
        file.write('{"txt": "three"}\n')
    with pytest.raises(UserError, match=r"text.jsonl:4: `text` must be text, but is absent; correct the line, or set"):
        build_datasets(make_spec(data))
    with caplog.at_level(logging.WARNING):
        again, _ = build_datasets(make_spec({**data, "malformed": "skip"}))
    assert isinstance(again, WindowDataset) and len(again.stream) == len(train.stream)
    assert "1 lines of `data.train` are left out" in caplog.text
