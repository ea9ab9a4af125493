"""Plain data as tables and lines for people. Apart from the live progress display, the one module that uses rich.

rich is imported inside the functions, so that a command that prints JSON does not pay for it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from scaling.records import BatchPlan
from scaling.units import format_count

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

WIDTH = 100
"""Columns of text that goes to a file, whatever the terminal: two runs' logs can then be compared line by line."""


def backend_words(backend: Mapping[str, Any]) -> str | None:
    """The backend of a spec in a few words: "ZeRO-2, optimizer on the cpu"; None where there is none."""
    if "kind" not in backend:
        return None
    words = [f"ZeRO-{backend['zero_stage']}" if backend.get("zero_stage") else str(backend["kind"])]
    if backend.get("reshard_after_forward") is False:
        words.append("kept gathered")
    if (backend.get("replicate") or 1) > 1:
        words.append(f"{backend['replicate']} replicas")
    if backend.get("frozen") == "replicate" and (backend["kind"] == "fsdp" or backend.get("zero_stage") == 3):
        words.append("frozen parts whole")
    words += [
        f"{part} on the {place}"
        for part in ("optimizer", "parameters")
        if isinstance(place := backend.get(f"offload_{part}"), str)
    ]
    if backend.get("cpu_offload"):
        words.append("all on the cpu")
    return ", ".join(words)


class GroupRow(Protocol):
    """What `groups_table` shows of one parameter group; `scaling.groups.Group` is one."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def lr(self) -> float | None: ...
    @property
    def weight_decay(self) -> float | None: ...
    @property
    def betas(self) -> tuple[float, float] | None: ...
    @property
    def frozen(self) -> bool: ...


def batch_line(plan: BatchPlan, sequences: int = 1) -> str:
    """One line for the head of a log: the sum behind the global batch, and its tokens; `sequences` are in a sample."""
    pieces = "sequences" if sequences == 1 else "pairs of sequences"
    length = plan.sequence_length // sequences
    return f"global batch {plan.sentence}; {plan.global_tokens:,} tokens a step in {pieces} of {length:,}"


def groups_table(rows: Sequence[GroupRow]) -> Table:
    """The parameter groups with their peak settings, in order, and the number of parameters that train."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    trained = sum(row.parameters for row in rows if not row.frozen)
    total = sum(row.parameters for row in rows)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_footer=True,
        title="Parameter groups",
        title_justify="left",
        caption=f"{format_count(trained)} of {format_count(total)} parameters train",
        caption_justify="left",
    )
    table.add_column("group", "total", overflow="fold")
    table.add_column("tensors", f"{sum(row.tensors for row in rows):,}", justify="right", no_wrap=True)
    table.add_column("parameters", format_count(total), justify="right", no_wrap=True)
    table.add_column("peak lr", justify="right", no_wrap=True)
    table.add_column("weight\ndecay", justify="right", no_wrap=True)
    table.add_column("betas", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.name),  # Text, so that brackets in a name are not read as markup
            f"{row.tensors:,}",
            format_count(row.parameters),
            _number(row.lr),
            _number(row.weight_decay),
            "-" if row.betas is None else ", ".join(_number(beta) for beta in row.betas),
            "frozen" if row.frozen else "trained",
            style="dim" if row.frozen else None,
        )
    return table


def as_text(renderable: RenderableType, width: int = WIDTH) -> str:
    """`renderable` as plain text of `width` columns, with neither colours nor trailing blanks."""
    stream = io.StringIO()
    _console(stream, width).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def print_table(renderable: RenderableType, width: int | None = None) -> None:
    """Show `renderable` on standard output: in colour and as wide as the terminal, unless `width` says otherwise."""
    from rich.console import Console

    Console(width=width, highlight=False).print(renderable)


def _console(stream: io.StringIO, width: int) -> Console:
    from rich.console import Console

    return Console(
        file=stream, width=width, color_system=None, force_terminal=False, force_jupyter=False, highlight=False
    )


def _number(value: float | None) -> str:
    """A setting in at most six digits; "-" where there is none, as in a frozen group."""
    return "-" if value is None else f"{value:.6g}"


class ParityRow(Protocol):
    """What `parity_table` shows of one run; `scaling.parity.Outcome` is one."""

    @property
    def backend(self) -> str: ...
    @property
    def world_size(self) -> int: ...
    @property
    def error(self) -> str | None: ...
    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def lr(self) -> float: ...
    @property
    def first_step_apart(self) -> int | None: ...


def parity_table(rows: Sequence[ParityRow], tolerance: float, steps: int) -> Table:
    """The largest relative differences of each run from the first, over `steps` steps."""
    from rich import box
    from rich.table import Table

    title = f"Largest relative difference from the first run over {steps} steps (tolerance {tolerance:g})"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("backend", "ranks", "loss", "grad norm", "lr", "parts at step"):
        table.add_column(name, justify="left" if name == "backend" else "right", no_wrap=True)
    for row in rows:
        if row.error is not None:
            table.add_row(row.backend, str(row.world_size), "failed", "-", "-", "-")
            continue
        apart = "-" if row.first_step_apart is None else str(row.first_step_apart)
        figures = [f"{value:.1e}" if value else "0" for value in (row.loss, row.grad_norm, row.lr)]
        table.add_row(row.backend, str(row.world_size), *figures, apart)
    return table


# ---------------------------------------------------------------- sheets: tables that are plain where nobody looks


@dataclass(frozen=True)
class Bar:
    """A cell that shows how parts fill a whole."""

    parts: Mapping[str, int]
    """In the order in which they are drawn."""
    whole: int | None
    """What they should fit in; None: their own sum."""

    def cells(self, width: int = 24) -> list[str | None]:
        """The part at each of `width` places, None where nothing is; "" at the last one if the whole is too small."""
        whole = self.whole or sum(self.parts.values()) or 1
        found: list[str | None] = []
        filled = 0
        for name, size in self.parts.items():
            filled += size
            found += [name] * (round(width * filled / whole) - len(found))
        return [*found[: width - 1], ""] if len(found) > width else found + [None] * (width - len(found))


PART_SIGNS = {
    "parameters": ("P", "blue"),
    "gradients": ("G", "cyan"),
    "optimizer": ("O", "green"),
    "activations": ("A", "yellow"),
    "logits": ("L", "red"),
    "communication": ("C", "magenta"),
    "workspace": ("W", "white"),
    "framework": ("F", "bright_black"),
    "around": ("+", "bright_black"),
}
"""Letter and colour of each part of memory in bars; "around" is what the allocator and CUDA take on top."""


@dataclass(frozen=True)
class Sheet:
    """A table of texts and bars."""

    title: str
    columns: Sequence[str]
    """Headings; one that begins with ">" is of numbers, set to the right."""
    rows: Sequence[Sequence[str | Bar]]
    caption: str = ""


Line = Sequence[tuple[str, str]]
"""A line of prose as texts with their styles, as rich names them ("bold red"); "" is plain."""


def print_lines(lines: Iterable[Line]) -> None:
    """Show lines on standard output: in colour on a terminal, else as they are, for which rich is not loaded."""
    if not sys.stdout.isatty():
        for line in lines:
            print("".join(text for text, _ in line).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        console.print(Text.assemble(*line), soft_wrap=True)


def print_sheet(sheet: Sheet) -> None:
    """Show `sheet` on standard output: drawn in colour on a terminal, else as plain lines, for which rich is not
    loaded.
    """
    if sys.stdout.isatty():
        print_table(_drawn(sheet))
    else:
        print(plain(sheet))


def plain(sheet: Sheet) -> str:
    """`sheet` as aligned text."""
    heads = [column.removeprefix(">") for column in sheet.columns]
    lines = [heads, *([_plain_cell(cell) for cell in row] for row in sheet.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    aligned = [
        "  ".join(
            text.rjust(width) if column.startswith(">") else text.ljust(width)
            for text, width, column in zip(line, widths, sheet.columns, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([sheet.title, *aligned, *([sheet.caption] if sheet.caption else [])])


def _plain_cell(cell: str | Bar) -> str:
    if isinstance(cell, str):
        return cell
    signs = {None: ".", "": ">"} | {name: sign for name, (sign, _) in PART_SIGNS.items()}
    return "".join(signs.get(name, "?") for name in cell.cells())


def _drawn(sheet: Sheet) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(sheet.title), title_justify="left", caption_justify="left")
    table.caption = Text(sheet.caption) if sheet.caption else None
    for column in sheet.columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in sheet.rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else _drawn_bar(cell) for cell in row))
    return table


def _drawn_bar(bar: Bar) -> Text:
    """Letters on colours: those who do not tell the colours apart still have the letters."""
    from rich.text import Text

    drawn = Text(no_wrap=True)
    for name, cells in groupby(bar.cells()):
        count = len(list(cells))
        if name is None:
            drawn.append("·" * count, "bright_black")
        elif not name:
            drawn.append(">" * count, "bold red")
        else:
            sign, colour = PART_SIGNS.get(name, ("?", "white"))
            drawn.append(sign * count, f"black on {colour}")
    return drawn


@contextmanager
def progress(title: str) -> Generator[Callable[[str, int], None], None, None]:
    """A bar over steps, on a terminal alone. Yields a function to call as each begins: its name, and how many there
    are in all.
    """
    if not sys.stderr.isatty():
        yield lambda name, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        begun = 0

        def begin(name: str, total: int) -> None:
            nonlocal begun
            bar.update(task, description=f"{title}: {name}", completed=begun, total=total)
            begun += 1

        yield begin
