"""Tables for people: right numbers, plain text for files, and rich only where it is used."""

import subprocess
import sys

from scaling.groups import Group
from scaling.records import BatchPlan
from scaling.view import Bar, Sheet, as_text, batch_line, groups_table, plain, print_sheet, print_table

ROWS = [
    Group("vision", ("a", "b"), 303_000_000, None, None, None, True),
    Group("language[0]", ("c",), 7_000_000_000, 1e-5, 0.1, (0.9, 0.95), False),
    Group("rest/undecayed", ("d",) * 1200, 51_234, 6e-4, 0.0, (0.9, 0.999), False),
]


def test_batch_line() -> None:
    line = batch_line(BatchPlan(480, 12, 5, 8, 1024))
    assert line == (
        "global batch 480 = 12 micro x 8 ranks x 5 accumulation; 491,520 tokens a step in sequences of 1,024"
    )


def test_groups_table_as_text() -> None:
    text = as_text(groups_table(ROWS))
    lines = [line.split() for line in text.splitlines()]
    assert ["vision", "2", "303M", "-", "-", "-", "frozen"] in lines
    assert ["language[0]", "1", "7B", "1e-05", "0.1", "0.9,", "0.95", "trained"] in lines  # brackets are no markup
    assert ["rest/undecayed", "1,200", "51.23k", "0.0006", "0", "0.9,", "0.999", "trained"] in lines
    assert ["total", "1,203", "7.303B"] in lines
    assert text.endswith("7B of 7.303B parameters train")
    assert "\x1b" not in text and all(line == line.rstrip() and len(line) <= 100 for line in text.splitlines())


def test_as_text_does_not_depend_on_the_terminal(monkeypatch) -> None:
    expected = as_text(groups_table(ROWS))
    for name, value in (("COLUMNS", "40"), ("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    assert as_text(groups_table(ROWS)) == expected


def test_print_table(capsys) -> None:
    print_table(groups_table(ROWS), width=100)
    assert "language[0]" in capsys.readouterr().out


def test_nothing_heavy_is_imported() -> None:
    modules = "scaling.records, scaling.batch, scaling.schedule, scaling.hardware, scaling.view"
    code = f"import sys, {modules}; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SHEET = Sheet("title", ["name", ">GiB", "memory"], [["[a]", "61.2", Bar({"parameters": 1, "logits": 1}, 4)]], "caption")


def test_sheets_are_plain_where_nobody_looks(capsys) -> None:
    print_sheet(SHEET)
    lines = ["title", "name   GiB  memory", "[a]   61.2  PPPPPPLLLLLL............", "caption"]
    assert capsys.readouterr().out.splitlines() == lines == plain(SHEET).splitlines()


def test_sheets_are_drawn_on_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_sheet(SHEET)
    out = capsys.readouterr().out
    assert "[a]" in out and "PPPPPP" in out and "·" * 12 in out and "caption" in out


def test_bars_are_whole() -> None:
    assert Bar({"a": 1, "b": 1, "c": 2}, 4).cells(4) == ["a", "b", "c", "c"]
    assert Bar({"a": 1}, 4).cells(4) == ["a", None, None, None]
    assert Bar({"a": 5}, 4).cells(4) == ["a", "a", "a", ""]  # too much
    assert Bar({"a": 3, "b": 1}, None).cells(4) == ["a", "a", "a", "b"]
    assert Bar({}, None).cells(2) == [None, None]
