"""What a spec needs on a machine, what fits, and the fastest way to run it: before anything is launched, without torch.

    python -m scaling.plan --spec gpt2-124m --gpus 8xH100-80GB
    python -m scaling.plan --model llama3-8b --sequence-length 8192 --global-batch-size 512 --gpus 8xH200 --gpus 8xB200
    python -m scaling.plan --spec llama-8b --gpus 8xH100-80GB --as-written --trace

Every figure about memory and time is predicted. `--trace`, which needs torch but no GPU, takes steps of the real engine
on tensors without values, and shows what they held beside what is predicted.
Exit code 2: the spec or the command line is wrong; 3: nothing fits.
"""

import dataclasses
import json
import re
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any

from scaling.errors import CommandLine, DoesNotFit, UserError, positive, run_program, write_output
from scaling.estimate.features import FeatureCache, feature_cache
from scaling.estimate.formulas import formulas
from scaling.estimate.memory import (
    COMMUNICATOR_BYTES,
    CONTEXT_BYTES,
    FRAGMENTS,
    FRAGMENTS_HIGH,
    FRAGMENTS_LOW,
)
from scaling.estimate.report import PHASES, report
from scaling.estimate.search import MARGIN, Candidate, Found, flags, known, search
from scaling.groups import Group
from scaling.hardware import GPU, GPUS, Cluster, load_hardware, parse_gpus
from scaling.imports import add_allow_import
from scaling.inventory import sample_length
from scaling.render import render
from scaling.spec import Document, Spec, parse_spec, placed, read_document
from scaling.spec.sections import PPO, curriculum_of
from scaling.units import GiB, format_bytes, format_count, format_seconds
from scaling.view import PART_SIGNS, Bar, Sheet, backend_words, print_sheet

COUNTS = (1, 4, 8)
"""GPUs in the table of hours and costs, then doubled up to those of the machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    own = load_hardware(options.hardware) if options.hardware else None
    clusters = _clusters(options.gpus, own)
    if options.write and len(clusters) > 1:
        raise UserError(f"`--write` must come with one `--gpus`, but there are {len(clusters)}; drop the others")
    document, notes = _document(options)
    spec = parse_spec(document)
    quiet = options.json == "-"
    try:
        results = [search(spec, cluster, options.margin, only_as_written=options.as_written) for cluster in clusters]
    except UserError as error:
        raise placed(error, document) from None
    if options.as_written:
        _check_written(results)
    traces = _traces(spec, clusters, document, options.allow_import) if options.trace else [None] * len(clusters)
    if not quiet:
        for note in notes:
            print(note)
        for found, traced in zip(results, traces, strict=True):
            _show(spec, found, options)
            if traced is not None:
                print_sheet(_traced(spec, found, traced))
                print()
        if len(results) > 1:
            print_sheet(_comparison(spec, results, options.usd_per_gpu_hour))
    _write(spec, document, results, traces, options)
    missing = [_problem(spec, found, options) for found in results]
    if all(missing):
        raise DoesNotFit("\n".join(filter(None, missing)))
    for problem in filter(None, missing):
        print(problem, file=sys.stderr)
    return 0


# ---------------------------------------------------------------- what is asked for


def _clusters(texts: Sequence[str], own: GPU | None) -> list[Cluster]:
    """The machines that `--gpus` names; `own` is the card of `--hardware`, which they may name too."""
    if not texts:
        if own is None:
            raise UserError("`--gpus` must be given, such as 8xH100-80GB, but is absent; name the machine")
        return [Cluster(1, 1, own)]
    return [_cluster(text, own) for text in texts]


def _cluster(text: str, own: GPU | None) -> Cluster:
    named = re.fullmatch(r"((?:[0-9]+[xX])?[0-9]+)[xX](.+)", text.strip())
    if own is not None and named is not None and named[2].casefold() == own.name.casefold():
        return dataclasses.replace(parse_gpus(f"{named[1]}x{GPUS[0].name}"), gpu=own)  # whose counts are checked there
    return parse_gpus(text)


def _document(options: Namespace) -> tuple[Document, list[str]]:
    """The spec that is planned, before validation, and notes about how it was made."""
    given = (options.sequence_length, options.global_batch_size)
    if (options.spec is None) == (options.model is None):
        what = "neither is" if options.spec is None else "both are"
        raise UserError(f"exactly one of `--spec` and `--model` must be given, but {what}; give one")
    if options.spec is not None:
        if any(value is not None for value in given):
            raise UserError(
                "`--sequence-length` and `--global-batch-size` must come with `--model`, but there is a spec; "
                "use --set data.sequence_length=N or --set batch.global_batch_size=N"
            )
        return read_document(options.spec, options.set), []
    if any(value is None for value in given):
        raise UserError(
            "`--model` must come with `--sequence-length N` and `--global-batch-size N`, but does not; add them"
        )
    from scaling.estimate.models import bare_document

    return bare_document(options.model, *given, options.set)


def _problem(spec: Spec, found: Found, options: Namespace) -> str | None:
    """Why nothing can be run, in one message; None where something can."""
    written = found.as_written
    if options.as_written and written is not None:
        return (
            f"as written it does not fit on {found.cluster.name}: {written.reason}" if written.fits is False else None
        )
    if found.best is not None:
        return None
    if not found.candidates:
        raise UserError(f"no candidate can be estimated: {found.rejected[0].reason}")
    from scaling.estimate.remedies import nothing_fits

    return nothing_fits(spec, found, options.margin)


def _traces(
    spec: Spec, clusters: Sequence[Cluster], document: Document, allow_import: Sequence[str]
) -> list[dict[str, Any] | None]:
    """The spec as it stands, traced once for each number of ranks."""
    from scaling.trace import trace

    sizes = dict.fromkeys(cluster.world_size for cluster in clusters)
    try:
        found = {world_size: trace(spec, world_size, allow_import) for world_size in sizes}
    except UserError as error:
        raise placed(error, document) from None
    return [found[cluster.world_size] for cluster in clusters]


def _check_written(results: Sequence[Found]) -> None:
    """UserError where the spec as it stands cannot be estimated, which is all that was asked for."""
    for found in results:
        if found.as_written is None:
            reason = found.rejected[0].reason if found.rejected else 'its micro-batch is "auto"'
            raise UserError(f"`--as-written` must come with a spec that runs as it stands, but {reason}; drop the flag")


# ---------------------------------------------------------------- what is written


def _write(
    spec: Spec,
    document: Document,
    results: Sequence[Found],
    traces: Sequence[dict[str, Any] | None],
    options: Namespace,
) -> None:
    if options.json or options.html:
        documents = [
            report(spec, found, options.margin) | ({} if traced is None else {"traced": traced})
            for found, traced in zip(results, traces, strict=True)
        ]
        if options.json:
            text = json.dumps(documents[0] if len(documents) == 1 else documents, indent=1, allow_nan=False)
            if options.json == "-":
                print(text)
            else:
                write_output(options.json, text + "\n", "--json")
        if options.html:
            from scaling.estimate.page import page

            write_output(options.html, page(spec.name, documents), "--html")
    if options.write and (best := results[0].best) is not None:
        write_output(options.write, json.dumps(_tuned(document, best), indent=2) + "\n", "--write")


def _tuned(document: Document, best: Candidate) -> Any:
    """The spec as the user wrote it, with the settings of the best candidate."""
    from scaling.spec.document import assign

    for assignment in flags(best.changes):
        assign(document, assignment)
    return document.value


# ---------------------------------------------------------------- what is shown


def _show(spec: Spec, found: Found, options: Namespace) -> None:
    """One machine: what the spec is, how it does as written, the ranking, and how to get the best."""
    for line in _head(spec, found, options.margin):
        print(line)
    best = found.best
    chosen = (best or found.as_written) if not options.as_written else found.as_written
    if found.candidates:
        print()
        print_sheet(_ranking(found, options.top))
    if best is not None and not options.as_written:
        print(f"best: {_words(best)}: {best.reason}")
        print("  " + (" ".join(f"--set {shlex.quote(flag)}" for flag in flags(best.changes)) or "as the spec stands"))
    if chosen is not None and (line := _length_line(spec, chosen, found.cluster.gpu, options.usd_per_gpu_hour)):
        print(line)
    if options.explain and (explained := chosen or next(iter(found.candidates), None)):
        for sheet in _ledger(explained, found.groups):
            print()
            print_sheet(sheet)
    if options.gpu_counts or options.usd_per_gpu_hour is not None:
        print()
        print_sheet(_costs(spec, found.cluster, options))
    print()


def _head(spec: Spec, found: Found, margin: float) -> list[str]:
    total = sum(group.parameters for group in found.groups)
    trained = sum(group.parameters for group in found.groups if not group.frozen)
    usable = "n/a" if found.usable_bytes is None else f"{found.usable_bytes / GiB:.1f} GiB"
    gpu = found.cluster.gpu
    lines = [
        f"{spec.name} on {found.cluster.name}: {format_count(total)} parameters, {format_count(trained)} train, "
        f"sequences of {sample_length(spec):,} tokens, {spec.precision}",
        f"usable memory of each {_unit(gpu)}: {usable} ({margin:.0%} left free)".replace("%", " %")
        + "; all figures below are predicted, none is measured",
    ]
    if gpu.is_cpu:
        lines.append(
            f"{gpu.name} is no GPU: memory is that of tensors alone; the rates behind the times were measured on "
            f"{gpu.measured.device}, but latencies and what small products lose are estimated as for a GPU"
        )
    elif gpu.measured.device is not None:
        lines.append(f"the rates behind the times were measured on {gpu.measured.device}")
    if (cache := feature_cache(spec)) is not None:
        lines.append(f"features in {cache.folder}: {_cache_words(cache)}")
    if found.as_written is not None:
        verdict = {True: "fits", False: "does not fit", None: "n/a"}[found.as_written.fits]
        lines.append(f"as written: {_words(found.as_written)}: {verdict}, {found.as_written.reason}")
    elif found.rejected and not found.rejected[0].changes:
        lines.append(f"as written: n/a: {found.rejected[0].reason}")
    else:
        lines.append('as written: n/a: the micro-batch is "auto"')
    return lines


def _cache_words(cache: FeatureCache) -> str:
    each = f"{format_bytes(cache.bytes_per_sample)} for each moment"
    if cache.samples is None or cache.total_bytes is None:
        return f"{each}; how many there are, no folder here says yet"
    return f"{format_bytes(cache.total_bytes)}, {each} of {cache.samples:,}"


def _unit(gpu: GPU) -> str:
    """What a rank runs on, in headings."""
    return "CPU rank" if gpu.is_cpu else "GPU"


def _ranking(found: Found, top: int) -> Sheet:
    unit = _unit(found.cluster.gpu)
    fit = sum(candidate.fits is not False for candidate in found.candidates)
    rows: list[list[str | Bar]] = []
    for place, candidate in enumerate(found.candidates[:top], start=1):
        rows.append(
            [
                str(place),
                str(backend_words(candidate.spec.backend.model_dump())),
                candidate.spec.activation_checkpointing,
                f"{candidate.plan.micro_batch} x {candidate.plan.accumulation}",
                f"{candidate.memory.high_bytes / GiB:.1f}" + ("" if candidate.fits is not False else " !"),
                _bar(candidate, found.usable_bytes),
                _figure(candidate.speed, ",.0f"),
                _figure(candidate.time.mfu, ".1%"),
                _duration(candidate.time.step_seconds),
            ]
        )
    signs = ", ".join(f"{sign} {name}" for name, (sign, _) in PART_SIGNS.items())
    heads = [">", "backend", "checkpointing", ">micro x accumulation", ">GiB", "memory", f">tokens/s/{unit}", ">MFU"]
    title = f"{len(found.candidates)} candidates in {found.seconds:.2f} s, {fit} fit; {len(found.rejected)} rejected"
    return Sheet(title, [*heads, ">step"], rows, f"GiB: upper end of the band; memory: {signs}")


def _bar(candidate: Candidate, usable: int | None) -> Bar:
    memory = candidate.memory
    around = max(0, memory.high_bytes - memory.peak_allocated_bytes)
    ordered = {name: memory.parts[name] for name in PART_SIGNS if name in memory.parts}
    return Bar(ordered | {"around": around}, usable)


def _words(candidate: Candidate) -> str:
    plan, mode = candidate.plan, candidate.spec.activation_checkpointing
    return f"{backend_words(candidate.spec.backend.model_dump())}, checkpointing {mode}, {plan.sentence}"


PART_WORDS = {
    "parameters": "weights as this rank holds them",
    "gradients": "gradients kept from the backward pass to the update",
    "optimizer": "moments of Adam, and masters where they are apart from the weights",
    "activations": "what forward passes keep for the backward pass",
    "logits": "scores over the vocabulary and the loss on them",
    "communication": "buffers and gathered copies for exchanges between ranks",
    "workspace": "short-lived results of operations",
    "framework": "what libraries hold",
    "sampling": "a step's share of the sampling of a rollout",
    "scoring": "the same of what the model and the reference make of each token",
    "compute": "forward and backward passes, with what is made again",
    "communication_exposed": "exchanges that no computation hides",
    "offload_exposed": "copies to and from the host that no computation hides",
    "overhead": "launching kernels, Python, the data",
}
PHASE_WORDS = {
    "build": "while all is made",
    "rollout": "while prompts are answered and the answers scored",
    "forward": "at the most in a forward pass",
    "backward": "in a backward pass",
    "optimizer": "in the update",
}
TIME_WORDS = {"optimizer": "the update of the weights"}


def _ledger(candidate: Candidate, groups: Sequence[Group]) -> list[Sheet]:
    """Memory at the peak and time of a step, line by line."""
    memory, duration = candidate.memory, candidate.time
    spec, ranks = candidate.spec, candidate.plan.world_size
    source = formulas(spec, groups, render(spec, ranks), ranks)
    rows = [
        [name, format_bytes(size), PART_WORDS.get(name, ""), source.get(name, "")]
        for name, size in memory.parts.items()
    ]
    around = f"CUDA context {format_bytes(CONTEXT_BYTES)}, each communicator {format_bytes(COMMUNICATOR_BYTES)}"
    sums = [
        ["allocated", memory.peak_allocated_bytes, f"their sum, in {memory.peak_phase}", ""],
        ["reserved", memory.peak_reserved_bytes, "what the caching allocator takes for it", f"x {FRAGMENTS}"],
        ["device", memory.device_used_bytes, "what nvidia-smi would show", around],
        ["at least", memory.low_bytes, "lower end of the band around it", f"x {FRAGMENTS_LOW}"],
        ["at most", memory.high_bytes, "upper end, which must fit", f"x {FRAGMENTS_HIGH}"],
        ["host", memory.host_bytes, _host_words(spec), "pinned; the engine's buffers included"],
        ["staging", memory.staging_bytes, "host memory, the copy that is saved", f"the next line / {ranks}"],
        [
            "checkpoint",
            memory.checkpoint_bytes,
            "on disk; saving takes no more of the device",
            "4 B frozen, 12 B trained",
        ],
    ]
    rows += [[str(name), format_bytes(int(size)), str(what), str(how)] for name, size, what, how in sums]
    rows += [
        [f"in {name}", format_bytes(size), "allocated, " + PHASE_WORDS[name], ""]
        for name, size in memory.phases.items()
    ]
    times = [
        [name, _duration(seconds), TIME_WORDS.get(name, PART_WORDS.get(name, ""))]
        for name, seconds in (dict.fromkeys(PHASES, 0.0) | duration.parts).items()
    ]
    times.append(["step", _duration(duration.step_seconds), "their sum: one optimizer step"])
    columns = ["part", ">bytes", "what it is", "formula or source"]
    return [
        Sheet(f"memory of {_words(candidate)}", columns, rows),
        Sheet("time of one optimizer step", ["part", ">time", "what it is"], times),
    ]


def _host_words(spec: Spec) -> str:
    found = "host memory, for what is offloaded"
    return f"{found}, the reference and a rollout" if isinstance(spec.objective, PPO) else found


def _traced(spec: Spec, found: Found, traced: dict[str, Any]) -> Sheet:
    """What the real engine held on tensors without values, beside the ledger of the same kernels and of the GPU's."""
    held, played = traced["memory"], traced["predicted"]
    written = None if found.as_written is None else found.as_written.memory
    peak = held["peak_allocated_bytes"]
    rows: list[list[str]] = []
    for part in dict.fromkeys((*PART_WORDS, *held["parts"], *played["parts"])):
        sizes = (held["parts"].get(part, 0), played["parts"].get(part, 0))
        on_gpu = 0 if written is None else written.parts.get(part, 0)
        if any(sizes) or on_gpu:
            off = format((sizes[1] - sizes[0]) / peak, "+.2%")
            rows.append([part, *map(format_bytes, sizes), off, "n/a" if written is None else format_bytes(on_gpu)])
    total = [held["peak_allocated_bytes"], played["peak_allocated_bytes"]]
    on_gpu = "n/a" if written is None else format_bytes(written.peak_allocated_bytes)
    rows.append(["all", *map(format_bytes, total), format(traced["predicted_to_traced"] - 1, "+.2%"), on_gpu])
    phases = (held["peak_phase"], played["peak_phase"], "", "n/a" if written is None else written.peak_phase)
    rows.append(["in", *phases])
    title = (
        f"traced: rank 0 of {traced['world_size']}, {traced['steps']} steps of {traced['micro_steps']} micro-steps on "
        f"{traced['tensors']} tensors in {format_seconds(traced['seconds'])}, with a CPU's kernels"
    )
    caption = "off: ledger less traced, of the traced peak; " + ", ".join(
        f"{phase} {format_bytes(size)}" for phase, size in traced["phases"].items()
    )
    if spec.compile:
        caption += "; blocks are traced uncompiled, the GPU's ledger has them compiled"
    heads = ["part", ">traced", ">ledger, same kernels", ">off", f">ledger, {found.cluster.gpu.name}"]
    return Sheet(title, heads, rows, caption)


def _comparison(spec: Spec, results: Sequence[Found], usd: float | None) -> Sheet:
    """The best of each machine beside each other."""
    rows: list[list[str]] = []
    for found in results:
        best, ranks = found.best, found.cluster.world_size
        if best is None:
            rows.append([found.cluster.name, "nothing fits", *["-"] * 6])
            continue
        speed = best.speed
        rows.append(
            [
                found.cluster.name,
                f"{backend_words(best.spec.backend.model_dump())}, {best.spec.activation_checkpointing}",
                f"{best.plan.micro_batch} x {best.plan.accumulation}",
                f"{best.memory.high_bytes / GiB:.1f}",
                _figure(speed, ",.0f"),
                _figure(None if speed is None else speed * ranks, ",.0f"),
                *_length(spec, best, ranks, usd),
            ]
        )
    unit = "rank" if any(found.cluster.gpu.is_cpu for found in results) else "GPU"
    heads = ["machine", "best", ">micro x accumulation", ">GiB", f">tokens/s/{unit}", ">tokens/s", ">hours", ">USD"]
    return Sheet(f"the best of each machine; hours and cost to {_steps(spec)}", heads, rows)


# ---------------------------------------------------------------- hours and costs


def _costs(spec: Spec, cluster: Cluster, options: Namespace) -> Sheet:
    """The best on each number of these GPUs, and what the whole training takes there."""
    from scaling.estimate.remedies import grown

    rows: list[list[str]] = []
    for count in options.gpu_counts or _counts(cluster.world_size):
        machine = cluster if count == cluster.world_size else grown(cluster, count)
        if machine is None:
            rows.append([str(count), "n/a: no whole number of nodes", *["-"] * 5])
            continue
        try:
            best = search(spec, machine, options.margin).best
        except UserError:
            rows.append([machine.name, "n/a: the global batch does not divide", *["-"] * 5])
            continue
        if best is None:
            rows.append([machine.name, "nothing fits", *["-"] * 5])
            continue
        rows.append(
            [
                machine.name,
                f"{backend_words(best.spec.backend.model_dump())}, {best.spec.activation_checkpointing}",
                f"{best.plan.micro_batch} x {best.plan.accumulation}",
                _figure(best.speed, ",.0f"),
                *_length(spec, best, count, options.usd_per_gpu_hour),
                _energy(spec, best, count, cluster.gpu),
            ]
        )
    unit = _unit(cluster.gpu)
    heads = [f"{unit}s", "best", ">micro x accumulation", f">tokens/s/{unit}", ">hours", ">USD", ">kWh"]
    return Sheet(f"to {_steps(spec)}", heads, rows)


def _counts(world_size: int) -> list[int]:
    found: list[int] = [*COUNTS]
    while found[-1] < world_size:
        found.append(2 * found[-1])
    return sorted({*found, world_size})


def _steps(spec: Spec) -> str:
    return "the end (n/a: the length is in epochs)" if spec.max_steps is None else f"{spec.max_steps:,} steps"


def _hours(spec: Spec, candidate: Candidate) -> float | None:
    grows = curriculum_of(spec.data) is not None
    step = known(candidate.time.mean_step_seconds if grows else candidate.time.step_seconds)
    return None if step is None or spec.max_steps is None else step * spec.max_steps / 3600


def _length(spec: Spec, candidate: Candidate, gpus: int, usd: float | None) -> list[str]:
    """Hours and US dollars to the last step."""
    hours = _hours(spec, candidate)
    cost = None if hours is None or usd is None else hours * gpus * usd
    return [_figure(hours, ",.1f"), _figure(cost, ",.0f")]


def _energy(spec: Spec, candidate: Candidate, gpus: int, gpu: GPU) -> str:
    """kWh of the cards at their rated power, where that is known."""
    hours, watts = _hours(spec, candidate), getattr(gpu, "power_watts", None)
    return _figure(None if hours is None or watts is None else hours * gpus * watts / 1000, ",.0f")


def _length_line(spec: Spec, candidate: Candidate, gpu: GPU, usd: float | None) -> str:
    hours = _hours(spec, candidate)
    if hours is None:
        return ""
    gpus = candidate.plan.world_size
    cost = "" if usd is None else f", {hours * gpus * usd:,.0f} USD"
    return f"{_steps(spec)}: {format_seconds(hours * 3600)}, {hours * gpus:,.1f} {_unit(gpu)} hours{cost}"


def _figure(value: float | None, form: str) -> str:
    value = known(value)
    return "n/a" if value is None else format(value, form)


def _duration(value: float | None) -> str:
    value = known(value)
    return "n/a" if value is None else format_seconds(value)


# ---------------------------------------------------------------- the command line


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m scaling.plan", description="Predict what fits on a machine, and how fast it is. Needs no GPU."
    )
    add = parser.add_argument
    add("--spec", metavar="SPEC", help="a spec.json, a recipe's name, or - for stdin")
    add("--model", metavar="NAME|PATH", help="in place of a spec: a recipe's model, a known size, a config.json's")
    add("--sequence-length", type=positive, metavar="N", help="with --model: tokens in one sequence")
    add("--global-batch-size", type=positive, metavar="N", help="with --model: sequences of one optimizer step")
    add("--gpus", action="append", default=[], metavar="[NODESx]COUNTxNAME", help="such as 8xH100-80GB; repeatable")
    add("--hardware", metavar="FILE.json", help="a card that the table lacks; --gpus may name it")
    add("--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field (JSON value); repeatable")
    add("--margin", type=_share, default=MARGIN, help="share of a card's memory left free (default %(default)s)")
    add("--top", type=positive, default=10, metavar="N", help="lines of the ranking (default %(default)s)")
    add("--as-written", action="store_true", help="estimate the spec as it stands, and nothing else")
    add("--trace", action="store_true", help="also run the spec as it stands on tensors without values; needs torch")
    add("--explain", action="store_true", help="memory and time of the best candidate, part by part")
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the result as JSON, in FILE or in place of the table; of several --gpus a list",
    )
    add("--html", metavar="FILE", help="the result as one page to look through")
    add("--write", metavar="FILE", help="the spec with the settings of the best candidate")
    add("--usd-per-gpu-hour", type=_price, metavar="USD", help="adds costs, and a table over numbers of GPUs")
    add("--gpu-counts", type=_numbers, metavar="N,N,…", help="numbers of GPUs of that table (default 1, 4, 8, 16, …)")
    add_allow_import(parser)
    return parser


def _share(text: str) -> float:
    if not re.fullmatch(r"0?\.[0-9]{1,9}|0", text):
        raise ArgumentTypeError(f"must be a share from 0 to below 1, such as 0.05, but is {text[:40]!r}")
    return float(text)


def _price(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ArgumentTypeError(f"must be a number of US dollars, such as 2.5, but is {text[:40]!r}")
    return float(text)


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


if __name__ == "__main__":
    run_program(main)
