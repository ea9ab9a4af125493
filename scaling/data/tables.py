"""Rows of parquet files, and of arrow files as `datasets` keeps them, by pyarrow: each an object as a JSON line is."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from scaling.errors import UserError

TABLES = (".parquet", ".arrow")
"""Ends of the names of such files."""
_STATE, _SPLITS = "state.json", "dataset_dict.json"
"""What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write into their folders (datasets/config.py)."""
_AT_A_TIME = 1024
"""Rows read at a time."""


def saved_files(folder: Path, field: str) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` has written, in their order; none for another folder.

    `field` is what errors call the list of globs. UserError for a folder of several splits, or one that is not whole.
    """
    if (folder / _SPLITS).is_file():
        splits = [str(folder / name) for name in _read_json(folder / _SPLITS, field).get("splits", [])]
        raise UserError(
            f"`{field}` must name one split of a saved data set, but {folder} has several; name {' or '.join(splits)}"
        )
    if not (folder / _STATE).is_file():
        return []
    files = _read_json(folder / _STATE, field).get("_data_files") or []
    found = [folder / str(one.get("filename")) for one in files if isinstance(one, dict)]
    for path in found:
        if path.parent != folder or not path.is_file():
            raise UserError(
                f"`{field}` must name whole saved data sets, but {folder} lacks {path.name[:100]}; save it again"
            )
    return found


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The bytes that each row takes, roughly, and its columns by name, without those that are null there.

    UserError for a file that is none.
    """
    try:
        import pyarrow as arrow
    except ImportError as error:
        raise UserError(
            f"data file {path} must be .jsonl or text where pyarrow is not installed ({error}); `pip install pyarrow`"
        ) from None
    try:
        for batch in _batches(path):
            size = int(batch.nbytes / max(1, batch.num_rows))
            for row in batch.to_pylist():
                yield size, {name: value for name, value in row.items() if value is not None}
    except (arrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"data file {path} must be a whole {path.suffix[1:]} file, but is not: {reason}; write it again"
        ) from error


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as arrow
    from pyarrow import ipc, parquet

    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_AT_A_TIME)
        return
    with arrow.memory_map(str(path)) as source:
        try:
            stream: Any = ipc.open_stream(source)  # what `datasets` writes
        except arrow.ArrowInvalid:
            opened: Any = ipc.open_file(source)  # Feather
            stream = (opened.get_batch(number) for number in range(opened.num_record_batches))
        for batch in stream:
            yield from (batch.slice(first, _AT_A_TIME) for first in range(0, batch.num_rows, _AT_A_TIME))


def _read_json(path: Path, field: str) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict):
            return found
    raise UserError(f"`{field}` must name whole saved data sets, but {path} cannot be read; save it again")
