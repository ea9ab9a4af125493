"""Folders of robot demonstrations in LeRobot's layout, versions 2.0 to 3.0: reading them, and writing one.

meta/info.json says what there is; data/**/*.parquet has a row for each moment: state, action, images as PNG or JPEG (or
the path of one), and the numbers of episode, moment and instruction; videos/**/*.mp4 have what is no image in a row.
Source: lerobot's src/lerobot/datasets/utils.py and docs (Hugging Face).
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scaling.errors import UserError

INFO = "meta/info.json"
NUMBERS = ("episode_index", "frame_index", "task_index")
CAMERA_PREFIX = "observation.images."
_NEAREST_FRAME = 0.6
"""Of the time between two frames: as far as this a video's may be from where it is looked for."""


@dataclass(frozen=True)
class Camera:
    """One of a folder's cameras."""

    name: str
    """Its feature's: "observation.images.wrist"."""
    height: int
    width: int
    is_video: bool


class Folder:
    """One folder of demonstrations, looked at. Raises UserError for whatever in it cannot be used."""

    def __init__(self, path: Path, state: str, action: str) -> None:
        self.path = path
        self.state_name, self.action_name = state, action
        self.info = _read_json(path / INFO, path)
        version = str(self.info.get("codebase_version", ""))
        if not version.startswith(("v2.", "v3.0")):
            raise self.refusal(f"{INFO} must be of codebase_version v2.0 to v3.0, but is of {version[:20] or 'none'!r}")
        self.fps = float(self.info.get("fps") or 0)
        self.files = sorted(path.glob("data/**/*.parquet"))
        if not self.files:
            raise self.refusal("data/ must hold .parquet files, but holds none")

    def refusal(self, what: str, how: str = "correct it, or leave the folder out") -> UserError:
        """`what` is wrong with the folder."""
        return UserError(f"data folder {self.path}: {what}; {how}")

    # ------------------------------------------------------------ what there is

    @cached_property
    def features(self) -> dict[str, Any]:
        """What each moment has, as meta/info.json says."""
        found = self.info.get("features")
        if not isinstance(found, dict):
            raise self.refusal(f"{INFO} must have an object `features`, but has none")
        return found

    def cameras(self, names: Sequence[str] | None) -> list[Camera]:
        """The cameras of these names, with or without what LeRobot puts before them; None: all, in order of name."""
        known = {name: one for name, one in self.features.items() if one.get("dtype") in ("image", "video")}
        if names is None:
            return [self._camera(name, known) for name in sorted(known)]
        return [self._camera(name if name in known else CAMERA_PREFIX + name, known) for name in names]

    def _camera(self, name: str, known: dict[str, Any]) -> Camera:
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise UserError(
                f"`data.cameras` must name cameras of {self.path}, but {name.removeprefix(CAMERA_PREFIX)} is none; "
                f"there are {there}"
            )
        feature = known[name]
        shape = list(feature.get("shape") or ())
        axes = [str(axis) for axis in feature.get("names") or ()]
        if len(shape) != 3:
            shape = [0, 0, 0]
        channels_first = axes[0].startswith("channel") if len(axes) == 3 else shape[2] not in (1, 3, 4)
        height, width = shape[1:] if channels_first else shape[:2]
        if not height or not width:
            raise self.refusal(f"{INFO} must give {name} a shape of height, width and channels, but does not")
        return Camera(name, int(height), int(width), feature["dtype"] == "video")

    def instructions(self) -> dict[int, str]:
        """What the robot is told, by task_index."""
        lines, table = self.path / "meta/tasks.jsonl", self.path / "meta/tasks.parquet"
        if lines.is_file():
            records = [
                _parsed(line, lines, n) for n, line in enumerate(lines.read_text("utf-8").splitlines(), 1) if line
            ]
            return {int(record["task_index"]): str(record["task"]) for record in records}
        if table.is_file():
            columns = _table(table, None).to_pydict()
            texts = next((values for name, values in columns.items() if name != "task_index"), None)
            if texts is not None and "task_index" in columns:
                return {int(n): str(text) for n, text in zip(columns["task_index"], texts, strict=True)}
        raise self.refusal("meta/ must hold tasks.jsonl or tasks.parquet with `task_index` and `task`, but does not")

    # ------------------------------------------------------------ rows

    @cached_property
    def rows(self) -> "Rows":
        """All rows of all files, in their order; but for the images."""
        found: list[dict[str, np.ndarray]] = []
        for file in self.files:
            table = _table(file, [self.state_name, self.action_name, *NUMBERS])
            columns = {name: _numbers(table, name, file) for name in NUMBERS}
            for name in (self.state_name, self.action_name):
                columns[name] = _vectors(table, name, file)
            found.append(columns)
        counts = [len(columns["episode_index"]) for columns in found]
        for name in (self.state_name, self.action_name):
            widths = {columns[name].shape[1] for columns in found}
            if len(widths) > 1:
                raise self.refusal(f"`{name}` must be as long in all files, but has {sorted(widths)} numbers")
        joined = {name: np.concatenate([columns[name] for columns in found]) for name in found[0]}
        return Rows(
            joined[self.state_name],
            joined[self.action_name],
            joined["episode_index"],
            joined["frame_index"],
            joined["task_index"],
            np.repeat(np.arange(len(counts)), counts),
        )

    def stamps(self) -> Iterator[str]:
        """What tells these files from others, or from themselves before a change, without reading them."""
        for file in (*self.files, *sorted(self.path.glob("videos/**/*.mp4")), *sorted(self.path.glob("images/**/*.*"))):
            found = file.stat()
            yield f"{file.relative_to(self.path)} {found.st_size} {found.st_mtime_ns}"

    # ------------------------------------------------------------ images

    def images(self, camera: Camera, size: int, told: Callable[[str], None]) -> Iterator[np.ndarray]:
        """What a camera saw at each row, uint8 [size, size, 3], stretched to that size.

        Where there is no such image, or one that is not as meta/info.json has it, black, and `told` hears why.
        """
        return self._video_images(camera, size, told) if camera.is_video else self._row_images(camera, size, told)

    def _row_images(self, camera: Camera, size: int, told: Callable[[str], None]) -> Iterator[np.ndarray]:
        import pyarrow.parquet as parquet

        for file in self.files:
            with parquet.ParquetFile(file) as opened:
                number = 0
                for batch in opened.iter_batches(batch_size=256, columns=[camera.name]):
                    for value in batch.column(0).to_pylist():
                        try:
                            image = self._decoded(value, camera, size)
                        except ValueError as why:
                            told(f"{file}: row {number}: `{camera.name}` {why}")
                            image = np.zeros((size, size, 3), np.uint8)
                        yield image
                        number += 1

    def _decoded(self, value: Any, camera: Camera, size: int) -> np.ndarray:
        from PIL import Image

        content = value.get("bytes") if isinstance(value, dict) else None
        try:
            if content is None:
                path = value.get("path") if isinstance(value, dict) else None
                if not path:
                    raise ValueError("must be an image, but is none")
                inside = (self.path / str(path)).resolve()
                if not inside.is_relative_to(self.path.resolve()):
                    raise ValueError(f"must lie in the data folder, but is {str(path)[:100]}")
                content = inside.read_bytes()
            image = Image.open(io.BytesIO(content))
            image.load()
        except OSError as error:  # of Pillow too
            raise ValueError(f"must be an image, but cannot be read: {str(error)[:100]}") from None
        if (image.height, image.width) != (camera.height, camera.width):
            raise ValueError(
                f"must be {camera.height} x {camera.width} pixels, as {INFO} has it, but is {image.height} x "
                f"{image.width}"
            )
        return resized(np.asarray(image.convert("RGB")), size)

    def _video_images(self, camera: Camera, size: int, told: Callable[[str], None]) -> Iterator[np.ndarray]:
        rows, wanted = self.rows, self._video_times(camera)
        names = np.array([str(file) for file, _ in wanted])
        times = np.array([time for _, time in wanted])
        for start, end in _runs(names):
            yield from self._frames(Path(names[start]), times[start:end], rows, start, camera, size, told)

    def _video_times(self, camera: Camera) -> list[tuple[Path, float]]:
        """For each row the video that shows it, and when, in seconds."""
        rows, template = self.rows, str(self.info.get("video_path") or "")
        if not template or self.fps <= 0:
            raise self.refusal(f"{INFO} must have `video_path` and `fps` where cameras are videos, but has not")
        chunk = int(self.info.get("chunks_size") or 1000)
        where = self._video_places(camera) if "{file_index" in template else None
        found: list[tuple[Path, float]] = []
        for episode, moment in zip(rows.episode.tolist(), rows.moment.tolist(), strict=True):
            if where is None:
                name = template.format(episode_chunk=episode // chunk, video_key=camera.name, episode_index=episode)
                begins = 0.0
            else:
                if episode not in where:
                    raise self.refusal(f"meta/episodes must know episode {episode}, but does not")
                chunk_index, file_index, begins = where[episode]
                name = template.format(video_key=camera.name, chunk_index=chunk_index, file_index=file_index)
            found.append((self.path / name, begins + moment / self.fps))
        return found

    def _video_places(self, camera: Camera) -> dict[int, tuple[int, int, float]]:
        """Of each episode: its video's numbers of chunk and file, and when it begins there; as version 3.0 has it."""
        keys = [f"videos/{camera.name}/{what}" for what in ("chunk_index", "file_index", "from_timestamp")]
        found: dict[int, tuple[int, int, float]] = {}
        for file in sorted(self.path.glob("meta/episodes/**/*.parquet")):
            columns = _table(file, ["episode_index", *keys]).to_pydict()
            for episode, *place in zip(columns["episode_index"], *(columns[key] for key in keys), strict=True):
                found[int(episode)] = (int(place[0]), int(place[1]), float(place[2]))
        return found

    def _frames(
        self,
        file: Path,
        times: np.ndarray,
        rows: "Rows",
        first: int,
        camera: Camera,
        size: int,
        told: Callable[[str], None],
    ) -> Iterator[np.ndarray]:
        """The frames of one video at these times, which rise."""
        frames = _decode_video(file)
        previous: tuple[float, np.ndarray] | None = None
        current = next(frames, None)
        for offset, time in enumerate(times.tolist()):
            while current is not None and current[0] < time:
                previous, current = current, next(frames, None)
            near = min((one for one in (previous, current) if one is not None), key=lambda one: abs(one[0] - time))
            if near is None or abs(near[0] - time) > _NEAREST_FRAME / self.fps:
                row = first + offset
                told(
                    f"{file}: `{camera.name}` must have a frame at {time:.3f} s (episode {rows.episode[row]}, moment "
                    f"{rows.moment[row]}), but has none"
                )
                yield np.zeros((size, size, 3), np.uint8)
            else:
                yield resized(near[1], size)


@dataclass(frozen=True)
class Rows:
    """The moments of a folder, in the order of its files."""

    state: np.ndarray
    """fp32 [rows, numbers]."""
    action: np.ndarray
    """fp32 [rows, numbers]."""
    episode: np.ndarray
    """int64 [rows], as the two that follow."""
    moment: np.ndarray
    """From 0 in each episode."""
    task: np.ndarray
    file: np.ndarray
    """Index into `Folder.files`."""


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """An image, uint8 [height, width, 3], stretched to [size, size, 3]."""
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Episode:
    """One demonstration."""

    instruction: str
    states: np.ndarray
    """fp32 [moments, numbers]."""
    actions: np.ndarray
    """fp32 [moments, numbers]."""
    images: dict[str, np.ndarray]
    """Of each camera uint8 [moments, height, width, 3]."""


def write_folder(path: Path, episodes: Sequence[Episode], *, robot: str, fps: int) -> None:
    """Write demonstrations in LeRobot's layout, version 2.1: a parquet file for each, images as PNG within."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    tasks = {text: number for number, text in enumerate(dict.fromkeys(one.instruction for one in episodes))}
    chunk, total = 1000, 0
    for number, episode in enumerate(episodes):
        count = len(episode.states)
        columns: dict[str, Any] = {
            "observation.state": arrow.array(list(episode.states.astype(np.float32))),
            "action": arrow.array(list(episode.actions.astype(np.float32))),
            **{CAMERA_PREFIX + name: _png_column(images) for name, images in episode.images.items()},
            "timestamp": arrow.array(np.arange(count, dtype=np.float32) / fps),
            "frame_index": arrow.array(np.arange(count)),
            "episode_index": arrow.array(np.full(count, number)),
            "index": arrow.array(np.arange(total, total + count)),
            "task_index": arrow.array(np.full(count, tasks[episode.instruction])),
        }
        file = path / f"data/chunk-{number // chunk:03d}/episode_{number:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table(columns), file)
        total += count
    (path / "meta").mkdir(parents=True, exist_ok=True)
    _write_lines(path / "meta/tasks.jsonl", [{"task_index": n, "task": text} for text, n in tasks.items()])
    lengths = [
        {"episode_index": n, "tasks": [one.instruction], "length": len(one.states)} for n, one in enumerate(episodes)
    ]
    _write_lines(path / "meta/episodes.jsonl", lengths)
    info = {
        "codebase_version": "v2.1",
        "robot_type": robot,
        "total_episodes": len(episodes),
        "total_frames": total,
        "total_tasks": len(tasks),
        "total_videos": 0,
        "total_chunks": -(-len(episodes) // chunk),
        "chunks_size": chunk,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "features": _features(episodes[0]),
    }
    (path / INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")  # last: with it the folder counts as whole


def _features(episode: Episode) -> dict[str, Any]:
    found: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": list(episode.states.shape[1:]), "names": None},
        "action": {"dtype": "float32", "shape": list(episode.actions.shape[1:]), "names": None},
    }
    for name, images in episode.images.items():
        names = ["height", "width", "channel"]
        found[CAMERA_PREFIX + name] = {"dtype": "image", "shape": list(images.shape[1:]), "names": names}
    for name, dtype in (("timestamp", "float32"), *((n, "int64") for n in (*NUMBERS, "index"))):
        found[name] = {"dtype": dtype, "shape": [1], "names": None}
    return found


def _png_column(images: np.ndarray) -> Any:
    import pyarrow as arrow
    from PIL import Image

    def png(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        return file.getvalue()

    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    return arrow.array([{"bytes": png(image), "path": None} for image in images], type=kind)


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


# ---------------------------------------------------------------- files


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"`data` must name folders of demonstrations in LeRobot's layout, but {folder} has no {INFO}: "
            f"{error.strerror or error}; correct the path"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} must be JSON, but is not: {error}; fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, but does not; fetch it again")
    return found


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if {"task_index", "task"} <= found.keys():
            return found
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path}:{number}: the line must be an object with `task_index` and `task`, but is not; correct it")


def _table(path: Path, columns: list[str] | None) -> Any:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            lacking = [name for name in columns or () if name not in file.schema_arrow.names]
            if lacking:
                raise UserError(
                    f"{path} must have the columns {', '.join(columns or ())}, but has no {lacking[0]}; fix it"
                )
            return file.read(columns)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{path} must be a parquet file, but cannot be read: {error}; fetch it again") from None


def _numbers(table: Any, name: str, file: Path) -> np.ndarray:
    """A column of whole numbers, int64 [rows]; some write each as a list of one."""
    values = np.array(table.column(name).to_pylist(), dtype=object).reshape(-1)
    try:
        return values.astype(np.int64)
    except (TypeError, ValueError):
        raise UserError(f"{file}: `{name}` must be whole numbers, but is not; correct it") from None


def _vectors(table: Any, name: str, file: Path) -> np.ndarray:
    """A column of lists as long as each other, fp32 [rows, numbers]; numbers alone are lists of one."""
    import pyarrow as arrow

    column = table.column(name).combine_chunks()
    count = len(column)
    lists = arrow.types.is_list(column.type) or arrow.types.is_large_list(column.type)
    if not lists and not arrow.types.is_fixed_size_list(column.type):
        values = column
    else:
        values = column.flatten()
        if (
            column.null_count
            or len(values) % max(1, count)
            or (lists and len(set(column.value_lengths().to_pylist())) > 1)
        ):
            raise UserError(f"{file}: `{name}` must be a list as long in each row, but is not; correct it")
    try:
        return values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(count, -1)
    except (TypeError, ValueError, arrow.ArrowException):
        raise UserError(f"{file}: `{name}` must be lists of numbers, but is not; correct it") from None


def _runs(names: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where the same name stands several times in turn: first place, and the one after the last."""
    edges = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)]
    return itertools.pairwise(edges)


def _decode_video(file: Path) -> Iterator[tuple[float, np.ndarray]]:
    """Each frame of a video with its time in seconds."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise UserError(
            f"`data` must have images where PyAV is not installed, but {file} is a video; `pip install av`"
        ) from None
    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                yield float(frame.time or 0.0), frame.to_ndarray(format="rgb24")
    except (OSError, ValueError, FFmpegError) as error:
        raise UserError(f"{file} must be a video, but cannot be read: {error}; fetch it again") from None
