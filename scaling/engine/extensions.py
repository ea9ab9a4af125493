"""Locks that a killed process left in torch's folder of compiled extensions.

While torch compiles an extension (DeepSpeed's async_io or pin_memory, say) a file named `lock` lies beside it, and
every other process waits until it is gone: for ever, if the one that made it was killed
(torch/utils/file_baton.py, up to 2.13).
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

logger = logging.getLogger("scaling")

_OLD_S = 1800.0
"""On a network file system the maker may be on another machine; but nothing compiles for so long."""
_REMOVAL_S = 0.5
"""Between closing its lock and removing it the maker needs less than this."""
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse", "9p", "glusterfs", "afs")


def remove_stale_locks(names: Iterable[str]) -> list[Path]:
    """Remove the locks on the extensions with these names that no process holds; returns those removed."""
    locks = [_extensions() / name / "lock" for name in names]
    stale = {lock: inode for lock in locks if (inode := _stale_inode(lock)) is not None}
    if stale:
        time.sleep(_REMOVAL_S)
    removed = [lock for lock, inode in stale.items() if _stale_inode(lock) == inode]
    for lock in removed:
        with contextlib.suppress(FileNotFoundError):
            lock.unlink()
        logger.warning(f"WARNING: removed {lock}: who made it was killed, and everybody would have waited for it")
    return removed


def _extensions() -> Path:
    """Where torch puts what it compiles (`_get_build_directory` in torch/utils/cpp_extension.py)."""
    if own := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(own)
    from torch.utils.cpp_extension import get_default_build_root

    hip, cuda = torch.version.hip, torch.version.cuda
    accelerator = f"rocm{hip.replace('.', '')}" if hip else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    return Path(get_default_build_root()) / f"{python}_{accelerator}"


def _stale_inode(lock: Path) -> int | None:
    """Which file a lock is that nobody holds; None where there is no such lock."""
    try:
        status = lock.stat()
    except OSError:
        return None
    if os.getuid() not in (0, status.st_uid):
        return None  # of another user's process nobody tells which files it has open
    if not sys.platform.startswith("linux") or _is_held(str(lock.resolve())):
        return None
    return status.st_ino if not _is_on_network(lock) or time.time() - status.st_mtime > _OLD_S else None


def _is_held(path: str) -> bool:
    """Whether a process of this machine has the file open, as the maker of a lock does."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended or closed a file since, or is nobody's business
                if any(os.readlink(descriptor) == path for descriptor in (process / "fd").iterdir()):
                    return True
    return False


def _is_on_network(path: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    kinds = {fields[1]: fields[2] for fields in mounts}
    folder = path.resolve()
    kind = next(kinds[str(parent)] for parent in folder.parents if str(parent) in kinds)
    return kind.startswith(_NETWORK)
