"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from scaling.doctor.case import Case

Severity = Literal["error", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")
"""Worst first. error: what was trained, or the run itself, is lost or wrong; warning: it is worse, slower or nearer to
failing than it need be; advice: it could be better."""


@dataclass(frozen=True)
class Finding:
    """Something that a rule found in a run."""

    rule: str
    """Name of the rule: words joined by dashes."""
    severity: Severity
    title: str
    evidence: str
    """The numbers that the rule saw, in one sentence."""
    threshold: str
    """What they would have had to stay within."""
    advice: str
    """What to do, in one or two sentences."""
    set: dict[str, Any]
    """What to pass to `--set`: dotted field -> value; {} where nothing can be set."""


@dataclass(frozen=True)
class Symptom:
    """What a rule found, before it is made into a Finding."""

    evidence: str
    advice: str = ""
    """For this run; "": the rule's own."""
    set: dict[str, Any] = field(default_factory=dict[str, Any])


class CannotJudge(Exception):
    """The run has too little data for a rule; the message says what is missing."""


@dataclass(frozen=True)
class Rule:
    """One illness: how it is known, and what helps."""

    name: str
    severity: Severity
    title: str
    looks_at: str
    threshold: str
    advice: str
    judge: Callable[[Case], Symptom | None]
    """None where the run is well in this respect. Raises CannotJudge."""


def rule(
    severity: Severity, title: str, *, looks_at: str, threshold: str, advice: str
) -> Callable[[Callable[[Case], Symptom | None]], Rule]:
    """Makes a Rule of the function that judges, and takes the name from it."""

    def made(judge: Callable[[Case], Symptom | None]) -> Rule:
        name = judge.__name__.replace("_", "-")
        return Rule(name, severity, title, looks_at, threshold, advice, judge)

    return made


def speaks(other: Rule, case: Case) -> bool:
    """Whether another rule finds something in the run: two that say the same are one too many."""
    try:
        return other.judge(case) is not None
    except CannotJudge:
        return False


def percent(share: float) -> str:
    """A share as people say it: "12 %", "0.4 %"."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 10 or value == round(value) else f"{value:.2g} %"
