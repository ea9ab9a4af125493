"""Which checkpoint a run goes on from. All ranks decide together; each reads a share of the files to verify them."""

import logging
import os
from pathlib import Path

from scaling.checkpoint.format import read_state
from scaling.checkpoint.store import BEST, LATEST, MANIFEST, Store, extra_files, problems_of, read_manifest
from scaling.engine.process import Process
from scaling.errors import CheckpointError
from scaling.run_folder import CHECKPOINTS

logger = logging.getLogger("scaling")


def newest_whole(store: Store, process: Process) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says; None where there is none at all.

    Damaged ones are named and passed over. CheckpointError where all are damaged, or where `latest` names one that is
    gone: to start afresh then would throw a run away without a word.
    """
    steps = store.steps() if process.is_main else []
    latest = store.pointed(LATEST) if process.is_main else None
    steps, latest = process.gather_objects((steps, latest))[0]  # pyright: ignore[reportGeneralTypeIssues]
    for step in reversed(steps):
        if not report(problems(store.path(step), process), process):
            return store.path(step)
    if steps:
        raise CheckpointError(
            f"`--resume` must find a whole checkpoint in {store.folder}, but all {len(steps)} are damaged; "
            "bring one back, or start afresh in another run folder"
        )
    if latest is not None:
        raise CheckpointError(
            f"`--resume` must find the checkpoint of step {latest} that {store.folder / LATEST} names, but there is "
            "none; bring it back, or start afresh in another run folder"
        )
    return None


def choose(store: Store, choice: str, process: Process) -> tuple[Path | None, str | None]:
    """The checkpoint to go on from, whole, or None; and the digest of the one, of another run, that it goes back to.

    `choice` is "auto", "never" or a path. A run that began from a path, and has checkpoints of its own since, goes on
    from those: the same command again is to go on. A path within the run itself is gone back to, unless a launcher has
    restarted this process; later checkpoints are then set aside.
    """
    if choice == "never":
        return None, None
    if choice == "auto" or is_restart():
        own = newest_whole(store, process)
        return own, None if own is None else read_state(own)["origin"]
    path = named_checkpoint(Path(choice), process)
    if path.resolve().parent == store.folder.resolve():
        process.on_main(lambda: _set_aside(store, read_state(path)["step"]))
        return path, read_state(path)["origin"]
    origin, own = digest_of(path), newest_whole(store, process)
    if own is None:
        return path, origin
    if read_state(own)["origin"] != origin:
        raise CheckpointError(
            f"`--resume` must be auto for a run folder with checkpoints of its own, but names {path}, and the run in "
            f"{store.folder.parent} did not begin there; name another `--run-dir`"
        )
    return own, origin


def _set_aside(store: Store, step: int) -> None:
    for path in store.set_aside(step):
        logger.warning(
            f"WARNING: going back to step {step}: {path} is a later checkpoint, set aside: delete it at will"
        )


def named_checkpoint(path: Path, process: Process) -> Path:
    """The checkpoint that a user names: its folder, a run folder (the newest whole one), or `latest` or `best` in it.

    CheckpointError where it is absent or damaged.
    """
    if path.name in (LATEST, BEST) and path.is_file():
        step = Store(path.parent).pointed(path.name)
        if step is None:
            raise CheckpointError(f"`{path}` must name a step folder, but does not; name the checkpoint itself")
        path = Store(path.parent).path(step)
    for folder in (path / CHECKPOINTS, path):
        if Store(folder).steps():
            found = newest_whole(Store(folder), process)
            assert found is not None
            return found
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"`--resume` must be auto, never, a checkpoint or a run folder that has one, but {path} is none; "
            "look for folders named step-*"
        )
    if found := problems(path, process):
        raise CheckpointError(f"`{path}` must be whole, but {found[0]}; use another checkpoint")
    return path


def problems(folder: Path, process: Process) -> list[str]:
    """What is wrong with the files of a checkpoint, as all ranks found it together."""
    mine = problems_of(folder, process.rank, process.world_size)
    everyone: list[list[str]] = process.gather_objects(mine)  # pyright: ignore[reportAssignmentType]
    return list(dict.fromkeys(problem for part in everyone for problem in part))


def report(found: list[str], process: Process) -> list[str]:
    """Log what is wrong with a checkpoint, once; returns it."""
    if process.is_main:
        for problem in found:
            logger.warning(f"WARNING: damaged checkpoint passed over: {problem}")
    return found


def digest_of(folder: Path) -> str:
    """What a checkpoint is known by: the digest of its manifest, which has those of all files."""
    found = read_manifest(folder)
    assert not isinstance(found, str), found
    return found[1]


def mention_extras(folder: Path) -> None:
    """Log the files in a checkpoint that its manifest does not know."""
    if extra := extra_files(folder):
        logger.warning(f"{folder} has {len(extra)} files that its manifest does not name, never read: {extra[:3]}")


def is_restart() -> bool:
    """Whether a launcher started this process again after a failure (torchrun --max-restarts counts them)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
