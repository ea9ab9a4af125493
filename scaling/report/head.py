"""The head of the page: how a run ended, what was run on what, and the figures that come first."""

from typing import Any

from scaling.report.words import devices, exit_words, flags, joules, loss_words, percent, rate_words
from scaling.summarize import is_number
from scaling.units import format_bytes, format_count, format_seconds

PEAK = "peak_allocated_bytes"


def status(end: dict[str, Any] | None) -> dict[str, str]:
    """How the run ended: "kind" ("good", "bad", "open"), "text", "reason"."""
    code = (end or {}).get("code")
    kind = "open" if not end else "good" if code == 0 else "paused" if code in (75, 143) else "bad"
    place = f" · step {end['step']}" if end and end.get("step") is not None and code != 0 else ""
    reason = str(end.get("reason") or "") if end and code != 0 else ""
    return {"kind": kind, "text": exit_words(end) + place, "reason": reason}


def facts(report: dict[str, Any]) -> list[str]:
    """What was run, on what."""
    model, precision, kind = report["model"], report["precision"], report["model"]["kind"]
    found: list[str] = []
    if (count := model["parameters"]) is not None:
        trained = model["trainable_parameters"]
        part = "" if trained == count else f", {format_count(trained)} train"
        found.append(f"{kind}, {format_count(count)} parameters{part}")
    elif kind:
        found.append(str(kind))
    return [*found, *(str(word) for word in (devices(report), report["backend"], precision) if word)]


def tiles(report: dict[str, Any]) -> list[dict[str, str]]:
    """The figures that come first, each with what it is to be read against."""
    predicted, measured = report["predicted"], report["measured"]
    loss, last, most = report["loss"], report["last_step"], report["max_steps"]
    found: list[tuple[str, str | None, str]] = []
    if last is not None:
        found += [
            ("loss", loss_words(loss["last"]), f"from {loss_words(loss['first'])}"),
            ("steps", f"{last:,}", f"of {most:,}" if is_number(most) else ""),
        ]
    if report["best_validation_loss"] is not None:
        value, step = loss_words(report["best_validation_loss"]), report["best_validation_step"]
        found.append(("best validation", value, f"after step {step:,}"))
    speed = report["tokens_per_second"]
    each = measured["tokens_per_second_per_gpu"]
    found += [
        ("tokens/s", speed and rate_words(speed), each and f"{rate_words(each)} a device"),
        ("step", *_beside(predicted["step_seconds"], measured["step_seconds"], format_seconds)),
        ("MFU", *_beside(predicted["mfu"], measured["mfu"], percent)),
    ]
    if (good := report["goodput"]) and good["share"] is not None:
        restarts = good["starts"] - 1
        words = "no restart" if not restarts else f"{restarts} restart{'' if restarts == 1 else 's'}"
        found.append(("goodput", percent(good["share"]), f"of {format_seconds(good['wall_s'])}, {words}"))
    found += [
        ("peak memory", *_beside(predicted[PEAK], measured[PEAK], format_bytes)),
        _energy_tile(report["energy"]),
    ]
    return [{"name": name, "value": value, "detail": detail or ""} for name, value, detail in found if value]


def _beside(predicted: float | None, measured: float | None, form: Any) -> tuple[str | None, str]:
    """A tile's value and detail; the prediction alone where nothing was measured."""
    if measured is None:
        return (None, "") if predicted is None else (form(predicted), "predicted, not measured")
    return form(measured), "" if predicted is None else f"predicted {form(predicted)}"


def _energy_tile(energy: dict[str, float | None]) -> tuple[str, str | None, str]:
    tokens, whole = energy["joules_per_million_tokens"], energy["joules"]
    detail = "per million tokens" if whole is None else f"per million tokens, {whole / 3.6e6:.3g} kWh in all"
    return ("energy", None if tokens is None else joules(tokens), detail)


def findings(report: dict[str, Any], run: str | None = None) -> list[dict[str, Any]]:
    """What the doctor found, its settings as flags. `run`: named where the page has several."""
    return [{**finding, "set": flags(finding.get("set") or {}), "run": run} for finding in report["findings"]]
