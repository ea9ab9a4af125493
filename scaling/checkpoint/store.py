"""The folder of a run's checkpoints: what is committed when, what is kept, what counts as whole. Knows no tensors.

    checkpoints/step-00001000/   a whole checkpoint: it is made under another name, synced, and renamed at the end
    checkpoints/latest, best     one line each, the name of a step folder; a convenience: a run resumes from the
                                 newest folder that its manifest confirms
    checkpoints/.incomplete-*    being written, or left by a process that was killed at it; removed at the next start
    checkpoints/.removed-*       being deleted

The order of a commit is what makes it safe at any moment: every file synced, the manifest after them, the folder
synced, the rename, the folder above synced; only then `latest`, and only then older ones are deleted.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
LATEST, BEST = "latest", "best"
_STEP = re.compile(r"step-(\d{8,12})")


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def step_name(step: int) -> str:
    """Name of the folder of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


class Store:
    """The checkpoints under one folder. One process changes it at a time: rank 0 of the run that holds its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of all folders that carry a final name, ascending."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / step_name(step)

    def place(self) -> tuple[int, int]:
        """Device and inode of the folder: another one under the same name is another folder."""
        found = os.stat(self.folder)
        return found.st_dev, found.st_ino

    def clean(self) -> None:
        """Remove what a killed process has left."""
        for pattern in (".incomplete-*", ".removed-*", ".pointer-*"):
            for path in self.folder.glob(pattern):
                _remove(path)

    def begin(self, step: int) -> Path:
        """A new empty folder to write the checkpoint of `step` into; its name is its own, whoever else still writes."""
        path = self.folder / f".incomplete-{step_name(step)}-{uuid.uuid4().hex[:8]}"
        os.makedirs(path)
        return path

    def commit(self, incomplete: Path, step: int, files: Mapping[str, FileRecord]) -> Path:
        """Give a written folder its manifest and its final name, and point `latest` to it. All `files` are synced."""
        write_synced(incomplete / MANIFEST, manifest_text({"step": step}, files))
        sync_folder(incomplete)
        final = self.path(step)
        if final.exists():  # the same step again, of a run that went back to an earlier one
            os.rename(final, self.folder / f".removed-{step_name(step)}-{uuid.uuid4().hex[:8]}")
        os.rename(incomplete, final)
        sync_folder(self.folder)
        self.point(LATEST, step)
        return final

    def discard(self, incomplete: Path) -> None:
        """Remove a folder that will not be committed."""
        _remove(incomplete)

    def point(self, name: str, step: int) -> None:
        """Make `latest` or `best` name the checkpoint of `step`."""
        temporary = self.folder / f".pointer-{uuid.uuid4().hex[:8]}"
        write_synced(temporary, step_name(step) + "\n")
        os.replace(temporary, self.folder / name)
        sync_folder(self.folder)

    def pointed(self, name: str) -> int | None:
        """The step that `latest` or `best` names; None where there is no such file, or its line is no step folder."""
        try:
            with open(self.folder / name, encoding="utf-8", errors="replace") as file:
                match = _STEP.fullmatch(file.read(100).rstrip("\n"))
        except OSError:
            return None
        return int(match[1]) if match else None

    def retire(self, keep_last: int | None, permanent: Collection[int]) -> list[int]:
        """Delete all but the newest `keep_last` and the permanent steps; never what `latest` or `best` names.

        Returns the steps deleted. To be called after a commit: the newest folder is then known to be whole.
        """
        if keep_last is None:
            return []
        latest = self.pointed(LATEST)
        # Later ones than the newest whole one are damaged ones that the run fell back from: they do not count.
        steps = [step for step in self.steps() if latest is None or step <= latest]
        kept = {*permanent, *[step for step in steps if step not in permanent][-keep_last:]}
        kept |= {step for name in (LATEST, BEST) if (step := self.pointed(name)) is not None}
        retired = [step for step in steps if step not in kept]
        for step in retired:
            # Renamed first: a folder that is half deleted must not carry a final name.
            removed = self.folder / f".removed-{step_name(step)}-{uuid.uuid4().hex[:8]}"
            os.rename(self.path(step), removed)
            _remove(removed)
        return retired

    def set_aside(self, after: int) -> list[Path]:
        """Rename the checkpoints later than step `after`, for a run that goes on from there on another path."""
        moved: list[Path] = []
        for step in self.steps():
            if step > after:
                moved.append(self.folder / f"set-aside-{step_name(step)}-{uuid.uuid4().hex[:4]}")
                os.rename(self.path(step), moved[-1])
        for name in (LATEST, BEST):
            if (self.pointed(name) or 0) > after:
                (self.folder / name).unlink()
        if moved:
            sync_folder(self.folder)
        return moved


def manifest_text(head: Mapping[str, Any], files: Mapping[str, FileRecord]) -> str:
    """The manifest: sizes and checksums of all files, and at its end the checksum of itself."""
    body = {**head, "files": {name: asdict(files[name]) for name in sorted(files)}}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def read_manifest(folder: Path) -> tuple[dict[str, FileRecord], str] | str:
    """Files and own digest of a checkpoint's manifest, or what is wrong with it."""
    path = folder / MANIFEST
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(1 << 28)
        document = json.loads(text)
        files = {str(name): FileRecord(int(f["bytes"]), str(f["sha256"])) for name, f in document["files"].items()}
        digest = document.pop("sha256")
        head = {name: value for name, value in document.items() if name != "files"}
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{path} is damaged (it is no manifest)"
    # Written again, it must come out the same to the byte: nothing in it can have changed unseen.
    if manifest_text(head, files) != text:
        return f"{path} is damaged (its own checksum is {digest})"
    for name in files:
        if Path(name).name != name or name in (".", "..", MANIFEST):
            return f"{path} names {name[:80]!r}, which is no file of its folder"
    return files, digest


def problems_of(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint: missing, of another size, or of other content than the manifest's.

    Several processes can share the reading: this one looks at every `parts`-th file, from `part` on.
    """
    found = read_manifest(folder)
    if isinstance(found, str):
        return [found]
    return [
        problem
        for index, (name, record) in enumerate(found[0].items())
        if index % parts == part and (problem := _problem_of(folder / name, record)) is not None
    ]


def extra_files(folder: Path) -> list[str]:
    """Names in a checkpoint's folder that its manifest does not know; nothing ever reads them."""
    found = read_manifest(folder)
    known = set() if isinstance(found, str) else set(found[0])
    return sorted(set(os.listdir(folder)) - known - {MANIFEST})


def _problem_of(path: Path, record: FileRecord) -> str | None:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return f"{path} is no plain file"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:
                return f"{path} has {size} bytes and should have {record.bytes}"
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if digest == record.sha256 else f"{path} has SHA-256 {digest} and should have {record.sha256}"


def write_synced(path: Path, content: str | bytes) -> FileRecord:
    """Write a file and wait until the disk has it."""
    data = content.encode() if isinstance(content, str) else content
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in this folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is tried again at the next start
    else:
        path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Room on the file system of `folder` for a user without privileges."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
