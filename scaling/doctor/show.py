"""A diagnosis as lines for people, as JSON, and the rules as a page."""

import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.doctor import MATTERS, RULES, Diagnosis, Finding
from scaling.doctor.rule import SEVERITIES
from scaling.view import WIDTH, Line

SCHEMA_VERSION = 1
COLOURS = {"error": "bold red", "warning": "bold yellow", "advice": "bold cyan"}
MOST_AT_END = 5
"""Findings that are told at a run's end: the rest is a command away."""
COMMAND = "python -m scaling.doctor"


def lines(folder: Path, diagnosis: Diagnosis, *, verbose: bool = False) -> Iterator[Line]:
    """The whole diagnosis; `verbose` lists the rules that could not judge too."""
    yield [(f"{folder}: {_counts(diagnosis)}", "bold")]
    for finding in diagnosis.findings:
        yield [("", "")]
        yield [
            (f"{finding.severity}  ", COLOURS[finding.severity]),
            (finding.title, "bold"),
            (f"  {finding.rule}", "dim"),
        ]
        for label, text in (("saw", finding.evidence), ("limit", finding.threshold), ("do", finding.advice)):
            for number, line in enumerate(_wrapped(text)):
                yield [(f"  {'' if number else label:<7}", "dim"), (line, "")]
        for number, flag in enumerate(_set_flags(finding)):
            yield [(f"  {'' if number else 'set':<7}", "dim"), (flag, "green")]
    yield [("", "")]
    if verbose:
        for name, why in diagnosis.not_judged.items():
            yield [(f"n/a  {name}: {why}", "dim")]
    yield [(_last_line(diagnosis, verbose), "dim")]


def _wrapped(text: str) -> list[str]:
    """In lines, a number and its unit on the same one."""
    held = text.replace(" %", "\N{NO-BREAK SPACE}%")
    wrapped = textwrap.wrap(held, WIDTH - 9, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in wrapped]


def short(folder: Path, diagnosis: Diagnosis) -> list[str]:
    """Errors and warnings in a line or two each, for the end of a run's log; [] where there are none."""
    grave = [finding for finding in diagnosis.findings if finding.severity != "advice"]
    found: list[str] = []
    for finding in grave[:MOST_AT_END]:
        found.append(f"doctor: {finding.severity}: {finding.title}: {finding.evidence}")
        found += [f"  {' '.join(_set_flags(finding))}"] if finding.set else []
    if grave:
        found.append(f"doctor: {_counts(diagnosis)}; {COMMAND} {shlex.quote(str(folder))} says what to do")
    return found


def as_json(folder: Path, diagnosis: Diagnosis) -> dict[str, Any]:
    """The whole diagnosis as plain JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run": str(folder),
        "rules": len(RULES),
        "findings": [
            {
                "rule": finding.rule,
                "severity": finding.severity,
                "title": finding.title,
                "evidence": finding.evidence,
                "threshold": finding.threshold,
                "advice": finding.advice,
                "set": finding.set,
                "command": " ".join(_set_flags(finding)),
            }
            for finding in diagnosis.findings
        ],
        "healthy": list(diagnosis.healthy),
        "not_judged": [{"rule": name, "why": why} for name, why in diagnosis.not_judged.items()],
    }


def rules_page() -> str:
    """All rules as Markdown: docs/doctor.md."""
    head = f"""# The doctor

`{COMMAND} RUN_DIR` looks at what a run folder records, and says what is wrong with the run,
by which numbers, and what to change. It is advice: the exit code is 0 whatever it finds, and 2 where a folder holds no
run. A rule that has too little data says so (`--verbose`, `--json`), which is not the same as a healthy run. At the end
of a run its errors and warnings are told in the log.

The {len(RULES)} rules, as the code has them (`{COMMAND} --rules` prints this page; a test compares the two).
Each limit is a named constant in `scaling/doctor/`, with the reason for it. What can be set is given as `--set` flags,
which make a valid spec of the run's own and leave its global batch as it is; what the planner predicts is called
predicted.
"""
    return "\n".join([head, *(_table(matter) for matter in MATTERS)])


def _table(matter: str) -> str:
    rows = [
        f"| `{rule.name}` | {rule.severity} | {rule.title} | {rule.looks_at} | {rule.threshold} | {rule.advice} |"
        for rule in MATTERS[matter]
    ]
    title = matter[0].upper() + matter[1:]
    head = "| rule | severity | title | looks at | healthy within | advice |\n|---|---|---|---|---|---|"
    return "\n".join([f"## {title}", "", head, *rows, ""])


def _set_flags(finding: Finding) -> list[str]:
    from scaling.estimate.search import flags

    return [f"--set {shlex.quote(flag)}" for flag in flags(finding.set)]


def _counts(diagnosis: Diagnosis) -> str:
    """ "1 error, 2 warnings"."""
    told: list[str] = []
    for severity in SEVERITIES:
        count = sum(finding.severity == severity for finding in diagnosis.findings)
        plural = "" if count == 1 or severity == "advice" else "s"
        told += [f"{count} {severity}{plural}"] if count else []
    return ", ".join(told) or "nothing found"


def _last_line(diagnosis: Diagnosis, verbose: bool) -> str:
    lacking = len(diagnosis.not_judged)
    told = (
        f"{len(RULES)} rules looked: {len(diagnosis.findings)} found something, {len(diagnosis.healthy)} found nothing"
    )
    if not lacking:
        return f"{told}."
    return f"{told}, {lacking} had too little data to judge" + ("." if verbose else " (--verbose says why).")
