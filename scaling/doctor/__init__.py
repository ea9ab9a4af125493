"""What is wrong with a run, and what to change: rules over what its folder records.

    for finding in examine(read_run(folder)):
        print(finding.title, finding.evidence, finding.set)

Needs neither torch nor numpy. A rule that has too little data says so: that is not the same as a healthy run.
"""

from dataclasses import dataclass
from pathlib import Path

from scaling.doctor import learning, machine, memory, run, speed
from scaling.doctor.case import Case
from scaling.doctor.rule import SEVERITIES, CannotJudge, Finding, Rule, Severity, Symptom
from scaling.errors import UserError
from scaling.summarize import RunData, read_run, trained_s

__all__ = ["MATTERS", "RULES", "Diagnosis", "Finding", "Severity", "at_end", "diagnose", "examine"]

MATTERS = {
    "the run": run.RULES,
    "learning": learning.RULES,
    "memory": memory.RULES,
    "machine": machine.RULES,
    "speed": speed.RULES,
}
"""All rules, by what they are about."""
RULES: tuple[Rule, ...] = tuple(rule for rules in MATTERS.values() for rule in rules)


@dataclass(frozen=True)
class Diagnosis:
    """What all rules say of one run."""

    findings: tuple[Finding, ...]
    """The worst first."""
    not_judged: dict[str, str]
    """Rules that could not tell, and what they lack."""

    @property
    def healthy(self) -> tuple[str, ...]:
        """Rules that looked, and found nothing."""
        spoken = {finding.rule for finding in self.findings} | self.not_judged.keys()
        return tuple(rule.name for rule in RULES if rule.name not in spoken)


def examine(data: RunData) -> list[Finding]:
    """What is wrong with a run, the worst first; [] where nothing is, or nobody can tell (see `diagnose`)."""
    return list(diagnose(data).findings)


def diagnose(data: RunData, *, ask_planner: bool = True) -> Diagnosis:
    """What every rule says of a run. `ask_planner`: whether to look for faster ways to run it, which takes seconds for
    a large model, and is done only where a card is known and much of its memory is free."""
    case = Case(data, ask_planner)
    findings: list[Finding] = []
    not_judged: dict[str, str] = {}
    for rule in RULES:
        try:
            symptom = rule.judge(case)
        except CannotJudge as why:
            not_judged[rule.name] = str(why)
            continue
        if symptom is not None:
            findings.append(_finding(rule, symptom, case))
    ordered = sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))  # stable: else as in RULES
    return Diagnosis(tuple(ordered), not_judged)


def _finding(rule: Rule, symptom: Symptom, case: Case) -> Finding:
    """Flags that do not make a valid spec of this one (a rule knows its own field, not all that go with it) are left
    out: the advice stands without them."""
    sound = symptom.set if case.takes(symptom.set) else {}
    return Finding(
        rule=rule.name,
        severity=rule.severity,
        title=rule.title,
        evidence=symptom.evidence,
        threshold=rule.threshold,
        advice=symptom.advice or rule.advice,
        set=sound,
    )


PLANNED_FROM_S = 600.0
"""Seconds of training from which on the planner is asked at a run's end: its search takes some, which is nothing
then."""


def at_end(folder: Path) -> list[str]:
    """What to say when the run in `folder` ends, as lines: its errors and warnings, and where to read more; [] where
    there are none. Raises nothing: a run that trained well must not fail for what is said about it."""
    from scaling.doctor.show import short

    try:
        data = read_run(folder)
        return short(folder, diagnose(data, ask_planner=trained_s(data.lines) >= PLANNED_FROM_S))
    except UserError as error:
        return [f"doctor: {error}"]
    except Exception as error:  # a bug of ours
        return [f"doctor: it could not look at the run ({type(error).__name__}: {error})"]
