"""Samples of robot demonstrations: what was seen, told and felt at one moment, and the actions that followed."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling.data import arm
from scaling.data.cache import TokenCounts, cached_tokens, made_folder
from scaling.data.chat import split_by_hash
from scaling.data.dataset import ActionBatch
from scaling.data.hashing import derive
from scaling.data.lerobot import Camera, Episode, Folder, write_folder
from scaling.data.progress import progress_in_bytes
from scaling.data.tokenizer import Tokenizer, open_tokenizer
from scaling.errors import UserError
from scaling.inventory import CHANNELS, instruction_words
from scaling.spec.sections import SIMULATED_ARM, AnyVla, EpisodeData

logger = logging.getLogger(__name__)

ARM_PIXELS = 64
"""Height and width of what the simulated arm's cameras see."""
ARM_FPS = 10
_ARM_NOISE = 0.03
"""By which a demonstrator's hand is pushed aside at each step, so that it shows how to come back (DART: Laskey et al.,
2017); what is recorded is what it wanted."""
_ARM_STAYS, _ARM_THERE = 3, 0.02
"""Steps that it rests on the disc, and how near to the middle that is."""
_ARM_SEED = 0x6465
_FORMAT = "scaling episode images 2"
"""Part of every key: to be raised when the same folder comes to be read otherwise."""
_CONSTANT = 1e-6
"""A number that varies by less, relative to its size or absolutely, is taken to be constant."""


@dataclass(frozen=True)
class Scale:
    """How numbers are brought near 1: (values - offset) / factor, each [numbers] in fp32."""

    offset: np.ndarray
    factor: np.ndarray

    def to_json(self) -> dict[str, list[float]]:
        """As checkpoints hold it."""
        return {"offset": self.offset.tolist(), "factor": self.factor.tolist()}

    @staticmethod
    def of(found: dict[str, list[float]]) -> "Scale":
        """The reverse of `to_json`."""
        return Scale(np.array(found["offset"], np.float32), np.array(found["factor"], np.float32))

    def apply(self, values: np.ndarray) -> np.ndarray:
        """To what a model takes."""
        return (values - self.offset) / self.factor

    def undo(self, values: np.ndarray) -> np.ndarray:
        """From what a model gives."""
        return values * self.factor + self.offset


@dataclass(frozen=True)
class Source:
    """One folder's moments, in the order of their episodes."""

    state: np.ndarray
    action: np.ndarray
    starts: np.ndarray
    """Where each episode begins, and the end of the last: int64 [episodes + 1]."""
    told: np.ndarray
    """Index of each episode's instruction, int64 [episodes]."""
    images: np.ndarray
    """uint8 [rows, views, size, size, 3], memory-mapped; or what vision made of them, see `with_features`."""
    digest: str
    """Of the images."""
    rows: np.ndarray
    """Of each moment its row in `images`, int64."""


@dataclass(frozen=True)
class EpisodeDataset:
    """Samples: one for each moment of the episodes of one part."""

    sources: Sequence[Source]
    moments: np.ndarray
    """Of each sample: its source, its place there, and the end of its episode; int64 [samples, 3]."""
    told: np.ndarray
    """Of each sample the row in `instructions`, int64."""
    instructions: np.ndarray
    """Token ids, int64 [texts, tokens]."""
    chunk_size: int
    scales: dict[str, Scale]
    """Of "state" and "action", from the episodes that are trained on."""
    identity: str
    """Of the numbers and texts of all episodes; whose pictures they are is taken for granted."""
    features: torch.dtype | None = None
    """Type of what vision made of the images, which then stands in their place; None: images."""
    bytes_per_token: float | None = None
    terms_per_sample = None

    def with_features(self, found: Sequence[np.ndarray], dtype: torch.dtype) -> "EpisodeDataset":
        """The same, with what vision made of the images of each source in their place, the fingerprint unchanged.

        `found`: of each source the bytes of numbers of `dtype`, uint8 [rows, views x patches, hidden x bytes].
        """
        sources = [replace(source, images=rows) for source, rows in zip(self.sources, found, strict=True)]
        return replace(self, sources=sources, features=dtype)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.identity.encode())
        digest.update(self.moments.astype("<i8").tobytes())
        digest.update(repr([scale.to_json() for scale in self.scales.values()]).encode())
        return digest.hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What whoever uses the model must know of its data."""
        return {name: scale.to_json() for name, scale in self.scales.items()}

    def __len__(self) -> int:
        return len(self.moments)

    def read(self, indices: np.ndarray) -> ActionBatch:
        """The samples with these indices; see `Dataset.read`."""
        images, states, actions, pads = [], [], [], []
        for number, place, end in self.moments[indices].tolist():
            source = self.sources[number]
            steps = np.arange(place, place + self.chunk_size)
            images.append(source.images[source.rows[place]])
            states.append(source.state[place])
            actions.append(source.action[np.minimum(steps, end - 1)])
            pads.append(steps >= end)
        state = self.scales["state"].apply(np.stack(states))
        action = self.scales["action"].apply(np.stack(actions))
        seen = torch.from_numpy(np.stack(images))
        return ActionBatch(
            images=seen if self.features is None else seen.view(self.features),
            instruction=torch.from_numpy(self.instructions[self.told[indices]]),
            state=torch.from_numpy(state.astype(np.float32)),
            actions=torch.from_numpy(action.astype(np.float32)),
            action_is_pad=torch.from_numpy(np.stack(pads)),
            keys=torch.from_numpy(indices.astype(np.int64)),
        )


def open_episode_data(data: EpisodeData, model: AnyVla) -> tuple[EpisodeDataset, EpisodeDataset | None]:
    """The training and the validation samples; images are decoded now if they are not in the cache.

    Errors: UserError for folders that cannot be used, StorageError for the cache folder.
    """
    tokenizer = open_tokenizer(data.tokenizer, instruction_words(model))
    train = [_open(folder, data, model) for folder in _folders(data.train, "data.train", data)]
    if isinstance(data.validation, list):
        held = [_open(folder, data, model) for folder in _folders(data.validation, "data.validation", data)]
        parts = [_all_of(train, 0), _all_of(held, len(train))]
        sources = [*train, *held]
    else:
        sources = train
        everything = _all_of(train, 0)
        stays, out = split_by_hash(_hashes(train), data.validation, "episodes")
        parts = [everything[stays], everything[out]]
    texts = list(dict.fromkeys(text for one in sources for text in one.texts))
    instructions = np.stack([instruction_ids(text, tokenizer, data) for text in texts]) if texts else np.zeros((0, 0))
    scales = _scales(sources, parts[0], data.normalization)
    identity = hashlib.sha256(repr([one.identity for one in sources]).encode()).hexdigest()
    made = [_samples(sources, part, texts) for part in parts]
    if not len(made[0][0]):
        raise UserError("`data.train` must hold episodes, but holds none that can be used; add some")
    datasets = [
        EpisodeDataset([one.source for one in sources], *found, instructions, model.action.chunk_size, scales, identity)
        for found in made
    ]
    return datasets[0], datasets[1] if len(datasets[1]) else None


def instruction_ids(text: str, tokenizer: Tokenizer, data: EpisodeData) -> np.ndarray:
    """Token ids of an instruction, int64 [data.sequence_length], filled up at its end."""
    ids = tokenizer.pieces([text])[0].astype(np.int64)
    if len(ids) > data.sequence_length:
        raise UserError(
            f"`data.sequence_length` must be at least {len(ids)}, the tokens of the instruction {text[:80]!r}, but is "
            f"{data.sequence_length}; lengthen it"
        )
    return np.pad(ids, (0, data.sequence_length - len(ids)), constant_values=tokenizer.end or 0)


# ---------------------------------------------------------------- folders


@dataclass(frozen=True)
class _Opened:
    source: Source
    texts: Sequence[str]
    """Of each episode."""
    identity: str


def _folders(names: Sequence[str], field: str, data: EpisodeData) -> list[Path]:
    found: list[Path] = []
    for name in names:
        if name == SIMULATED_ARM:
            found.append(_simulated(data))
            continue
        path = Path(name)
        if not path.is_dir():
            raise UserError(
                f"`{field}` must name folders of demonstrations, or {SIMULATED_ARM}, but {name[:200]} is no folder in "
                f"{Path.cwd()}; correct it"
            )
        found.append(path)
    return found


def _open(path: Path, data: EpisodeData, model: AnyVla) -> _Opened:
    folder = Folder(path, data.state, data.action)
    rows, texts = folder.rows, folder.instructions()
    for field, values, name in (("action_dim", rows.action, data.action), ("state_dim", rows.state, data.state)):
        if values.shape[1] != getattr(model.action, field):
            raise UserError(
                f"`model.action.{field}` must be {values.shape[1]}, the numbers of `{name}` in {path}, but is "
                f"{getattr(model.action, field)}; set it"
            )
    cameras = folder.cameras(data.cameras)
    if len(cameras) != model.vision.views:
        names = ", ".join(camera.name for camera in cameras) or "none"
        raise UserError(
            f"`model.vision.views` must be {len(cameras)}, the cameras of {path} ({names}), but is "
            f"{model.vision.views}; set it, or name some in `data.cameras`"
        )
    order = np.lexsort((rows.moment, rows.episode))
    images, digest, damaged = _images(folder, cameras, model.vision.image_size, data)
    kept = _sound(folder, order, texts, damaged, data)
    order, starts = _joined(order, kept)
    tasks = rows.task[order[starts[:-1]]]
    named = [texts[task] for task in tasks.tolist()]
    source = Source(rows.state[order], rows.action[order], starts, tasks, images, digest, order)
    identity = hashlib.sha256(repr((named, starts.tolist())).encode())
    identity.update(source.state.tobytes() + source.action.tobytes())
    return _Opened(source, named, identity.hexdigest())


def _sound(
    folder: Folder, order: np.ndarray, texts: dict[int, str], damaged: dict[int, str], data: EpisodeData
) -> list[np.ndarray]:
    """Of each episode that can be used the rows, in order. What is wrong with others is refused, or counted."""
    rows, kept, left_out = folder.rows, list[np.ndarray](), 0
    bounds = np.flatnonzero(np.diff(rows.episode[order])) + 1
    for own in np.split(order, bounds) if len(order) else []:
        wrong = _wrong_with(folder, own, texts, damaged, data)
        if wrong is None:
            kept.append(own)
        elif data.malformed == "refuse":
            raise UserError(f'{wrong}; correct it, or set `data.malformed` to "skip"')
        else:
            left_out += 1
    if left_out:
        logger.warning(
            f"WARNING: {left_out:,} episodes of {folder.path} are left out: they are malformed, and `data.malformed` "
            'is "skip"'
        )
    return kept


def _wrong_with(
    folder: Folder, own: np.ndarray, texts: dict[int, str], damaged: dict[int, str], data: EpisodeData
) -> str | None:
    """What is wrong with an episode of these rows; None: nothing."""
    rows = folder.rows
    place = f"{folder.files[rows.file[own[0]]]}: episode {rows.episode[own[0]]}"
    for name, values in ((data.action, rows.action), (data.state, rows.state)):
        bad = np.flatnonzero(~np.isfinite(values[own]).all(axis=1))
        if len(bad):
            return f"{place}, moment {rows.moment[own[bad[0]]]}: `{name}` must be finite numbers, but is not"
    if not np.array_equal(rows.moment[own], np.arange(len(own))):
        return f"{place}: `frame_index` must count from 0 without a gap, but does not"
    unknown = [task for task in rows.task[own].tolist() if not texts.get(task, "").strip()]
    if unknown:
        return f"{place}: `task_index` must be one that meta/ has an instruction for, but is {unknown[0]}"
    return next((damaged[row] for row in own.tolist() if row in damaged), None)


def _joined(order: np.ndarray, kept: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.concatenate([[0], np.cumsum([len(own) for own in kept], dtype=np.int64)]).astype(np.int64)
    return (np.concatenate(kept) if kept else order[:0]), starts


# ---------------------------------------------------------------- images


def _images(
    folder: Folder, cameras: Sequence[Camera], size: int, data: EpisodeData
) -> tuple[np.ndarray, str, dict[int, str]]:
    """What all cameras saw at each row, uint8 [rows, views, size, size, 3], memory-mapped; its digest; and by row what
    is wrong with some of it."""
    names = [camera.name for camera in cameras]
    parts = [_FORMAT, str(folder.path.resolve()), str(size), *names, *folder.stamps()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    count, views = len(folder.rows.episode), len(cameras)
    shape = (count, views, size, size, CHANNELS)
    pixels = int(np.prod(shape))

    def write(counts: TokenCounts) -> Iterator[np.ndarray]:
        wrong: dict[int, str] = {}
        digest = hashlib.sha256()
        row = 0

        def note(why: str) -> None:
            wrong.setdefault(row, why)

        with progress_in_bytes(f"decoding the images of {folder.path}", pixels) as advance:
            streams = [folder.images(camera, size, note) for camera in cameras]
            for views_now in zip(*streams, strict=True):
                counts.documents += 1
                views_seen = np.stack(views_now).reshape(-1)
                digest.update(views_seen.data)
                yield views_seen
                advance(pixels // max(1, count))
                row += 1
        if row != count:
            raise folder.refusal(f"its images must be as many as its rows, but are {row} for {count}")
        lines = [digest.hexdigest(), *(f"{row} {why}" for row, why in sorted(wrong.items()))]
        yield np.frombuffer("\n".join(lines).encode(), np.uint8)

    found = cached_tokens(Path(data.cache), key, np.dtype("u1"), write)
    digest, *told = bytes(np.asarray(found.tokens[pixels:])).decode().splitlines()
    damaged = {int(number): why for number, _, why in (line.partition(" ") for line in told)}
    return found.tokens[:pixels].reshape(shape), digest, damaged


# ---------------------------------------------------------------- samples


def _all_of(opened: Sequence[_Opened], first: int) -> np.ndarray:
    """All episodes: their source, counted from `first`, and their number there; int64 [episodes, 2]."""
    found = [(first + n, e) for n, one in enumerate(opened) for e in range(len(one.texts))]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _hashes(opened: Sequence[_Opened]) -> np.ndarray:
    """One number for what each episode holds, uint64."""
    digests: list[bytes] = []
    for one in opened:
        for number, text in enumerate(one.texts):
            part = slice(one.source.starts[number], one.source.starts[number + 1])
            content = one.source.state[part].tobytes() + one.source.action[part].tobytes() + text.encode()
            digests.append(hashlib.blake2b(content, digest_size=8).digest())
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _samples(opened: Sequence[_Opened], part: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`moments` and `told` of a dataset of these episodes."""
    number_of = {text: number for number, text in enumerate(texts)}
    moments, told = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)]
    for source, episode in part.tolist():
        start, end = opened[source].source.starts[episode : episode + 2].tolist()
        places = np.arange(start, end)
        moments.append(np.stack((np.full_like(places, source), places, np.full_like(places, end)), axis=1))
        told.append(np.full_like(places, number_of[opened[source].texts[episode]]))
    return np.concatenate(moments), np.concatenate(told)


def _scales(opened: Sequence[_Opened], part: np.ndarray, kind: str) -> dict[str, Scale]:
    """From the episodes that are trained on, in fp64."""
    found: dict[str, Scale] = {}
    for name in ("state", "action"):
        pieces = [
            getattr(opened[source].source, name)[slice(*opened[source].source.starts[episode : episode + 2])]
            for source, episode in part.tolist()
        ]
        if pieces:
            found[name] = _scale(np.concatenate(pieces).astype(np.float64), kind)
    return found


def _scale(values: np.ndarray, kind: str) -> Scale:
    if kind == "mean_std":
        offset, factor = values.mean(axis=0), values.std(axis=0)
    elif kind == "min_max":  # to -1 .. 1
        low, high = values.min(axis=0), values.max(axis=0)
        offset, factor = (low + high) / 2, (high - low) / 2
    else:
        offset, factor = np.zeros(values.shape[1]), np.ones(values.shape[1])
    constant = factor <= _CONSTANT * np.maximum(1.0, np.abs(offset))
    return Scale(offset.astype(np.float32), np.where(constant, 1.0, factor).astype(np.float32))


# ---------------------------------------------------------------- the simulated arm


def _simulated(data: EpisodeData) -> Path:
    """The folder of the simulated arm's demonstrations, made if it is not there."""
    count = data.simulated_episodes

    def make(folder: Path) -> None:
        write_folder(folder, list(demonstrations(count)), robot="simulated arm", fps=ARM_FPS)

    name = Path(data.simulated_folder).name
    return made_folder(Path(data.cache), name, make, f"demonstrating {count} episodes of the simulated arm")


def demonstrations(count: int) -> Iterator[Episode]:
    """Episodes of the demonstrator, on the tables 0 .. count-1 of a seed of their own."""
    at_a_time = 64
    for first in range(0, count, at_a_time):
        yield from _demonstrated(np.arange(first, min(first + at_a_time, count)))


def _demonstrated(numbers: np.ndarray) -> list[Episode]:
    tables = arm.start(_ARM_SEED, numbers)
    told = arm.instructions(tables)
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in numbers]
    rests = np.zeros(len(numbers), np.int64)
    for step in range(arm.MOST_STEPS):
        going = np.flatnonzero(rests < _ARM_STAYS)
        if not len(going):
            break
        now = arm.some(tables, going)
        actions, states, seen = arm.demonstrate(now), arm.state(now), arm.pictures(now, ARM_PIXELS)
        for place, number in enumerate(going.tolist()):
            found[number].append((states[place], actions[place].astype(np.float32), seen[place]))
        rests += np.linalg.norm(tables.goal - tables.tip, axis=1) <= _ARM_THERE
        push = np.random.Generator(np.random.Philox(key=derive(_ARM_SEED, int(numbers[0]), step)))
        pushed = arm.demonstrate(tables) + _ARM_NOISE * push.standard_normal(tables.tip.shape)
        tables = arm.move(tables, np.where((rests > 0)[:, None], arm.demonstrate(tables), pushed))
    return [_episode(text, moments) for text, moments in zip(told, found, strict=True)]


def _episode(text: str, moments: Sequence[tuple[np.ndarray, ...]]) -> Episode:
    states, actions, seen = (np.stack(part) for part in zip(*moments, strict=True))
    return Episode(text, states, actions, {name: seen[:, view] for view, name in enumerate(arm.CAMERAS)})
