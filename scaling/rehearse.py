"""One rank of many, alone: what it would hold in memory, and how long its own work takes.

    python -m scaling.rehearse --spec SPEC --world-size 8 [--steps 3] [--json FILE]
    python -m scaling.rehearse --matrix FILE [--json FILE]

FILE is a list of {"spec": …, "world_size": …, "set": ["a.b.c=VALUE", …], "steps": …}: each is rehearsed in a process
of its own, and what does not fit, or fails, is a result too.

Builds the engine of the spec as rank 0 of that many ranks and takes a few of its steps on made-up samples, for real, on
this one device. The other ranks do not exist: every collective returns at once, with this rank's own values, so memory
is that of the real run, while losses mean nothing and communication costs no time. On a GPU the caching allocator is
asked, on a CPU the bytes of live tensors are counted.
"""

import contextlib
import gc
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scaling.errors import CommandLine, DoesNotFit, UserError, positive, run_program
from scaling.estimate.memory import MemoryModel
from scaling.estimate.report import memory_report
from scaling.hardware import gpu_from_device_name
from scaling.imports import add_allow_import
from scaling.inventory import CHANNELS, parameters, seen_shape, sequences, words
from scaling.run import Job, device_name, resolve
from scaling.run_folder import environment
from scaling.spec import Spec, load_spec
from scaling.spec.sections import PPO, AnyVla, Decoder, Recorded, caches_features, packs
from scaling.units import format_bytes, format_seconds
from scaling.watch.exhausted import Exhausted

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    from scaling.data.dataset import MicroBatch, PairBatch, Samples
    from scaling.data.prompts import PromptDataset
    from scaling.engine.process import Process
    from scaling.engine.protocol import Engine
    from scaling.profile.meter import MemoryMeter


def main() -> int:
    options = _parser().parse_args()
    if options.matrix:
        report = []
        for report_of_one in rehearse_all(_cells(options.matrix), options.steps, allow_import=options.allow_import):
            print(_line(report_of_one), flush=True)
            report.append(report_of_one)
    else:
        if not options.spec or not options.world_size:
            raise UserError("`--spec` and `--world-size` must be given, but are not; give them, or `--matrix`")
        job = resolve(load_spec(options.spec, options.set), options.world_size, options.allow_import)
        report = rehearse(job, options.steps)
        for line in lines(report):
            print(line)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def rehearse_all(
    cells: Iterable[dict[str, Any]], steps: int, *, preload: Sequence[str] = (), allow_import: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rehearse each cell ("spec", "world_size", "set", "steps") in a process of its own; its report, or "error".

    `preload`: further modules that many of them need.
    """
    for cell in cells:
        try:
            found = apart(_rehearse_cell, cell, steps, allow_import, preload=preload)
        except (UserError, ChildProcessError) as error:
            found = {"error": str(error)}
        yield {"cell": cell, **found}


def _rehearse_cell(cell: dict[str, Any], steps: int, allow_import: Sequence[str]) -> dict[str, Any]:
    job = resolve(load_spec(cell["spec"], cell.get("set", [])), cell["world_size"], allow_import)
    return rehearse(job, cell.get("steps", steps))


def forks(*preload: str) -> "ForkServerContext":
    """Processes that are forked from one that has imported torch and `preload`, and nothing that looks for a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch._dynamo", "torch.distributed.fsdp", "scaling.loop", "scaling.checkpoint.keeper", *preload]
    )
    return context


class ProcessEnded(ChildProcessError):
    """A process did not come to return anything."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the process ended with exit code {code}")
        self.code = code
        """As multiprocessing has it: less than 0 for a signal."""


def apart(
    work: Callable[..., dict[str, Any]],
    *arguments: Any,
    preload: Sequence[str] = (),
    method: Literal["forkserver", "spawn"] = "forkserver",
) -> dict[str, Any]:
    """What `work` returns in a process of its own. Raises its UserError, and ProcessEnded where it ends otherwise.

    `preload`: further modules that it and later ones need. "spawn" leaves nothing behind: where there are few.
    """
    context = multiprocessing.get_context("spawn") if method == "spawn" else forks(*preload)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        found, problem = receiver.recv()
    except EOFError:
        process.join()
        raise ProcessEnded(process.exitcode) from None
    process.join()
    if problem is not None:
        raise UserError(problem)
    return found


def _send(sender: Any, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((work(*arguments), None))
    except UserError as error:
        sender.send((None, str(error)))


def _cells(path: str) -> list[dict[str, Any]]:
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))
        if all({"spec", "world_size"} <= cell.keys() <= {"spec", "world_size", "set", "steps"} for cell in cells):
            return cells
        problem = "a cell has other keys"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    raise UserError(
        '`--matrix` must be a JSON list of {"spec": …, "world_size": …, "set": […], "steps": …}, but is not '
        f"({problem}); correct it"
    )


def _line(report: dict[str, Any]) -> str:
    cell = report["cell"]
    name = f"{Path(cell['spec']).stem} x{cell['world_size']} {' '.join(cell.get('set', []))}"
    if "error" in report:
        return f"{name}: {report['error']}"
    memory = report["memory"]
    ratio = f"{report['measured_to_predicted']:.2%}".replace("%", " %")
    peak = format_bytes(memory["peak_allocated_bytes"])
    return f"{name}: {peak} in {memory['peak_phase']}, {ratio} of what is predicted"


def rehearse(job: Job, steps: int) -> dict[str, Any]:
    """Take `steps` optimizer steps as rank 0 of `job`, the first two of which warm up and are not timed.

    In a process that has no process group, and will have no other afterwards. Raises DoesNotFit where this device has
    not enough memory.
    """
    from scaling.engine.build import import_backend
    from scaling.engine.process import rehearsed_process
    from scaling.profile.meter import build_meter

    with rehearsed_process(job.plan.world_size) as process:
        import_backend(job.spec, process)  # the meter knows functions of libraries that are there
        meter = build_meter(process.device)
        try:
            with meter:
                seconds = take_steps(job, process, meter, steps)
        except Exhausted as error:
            raise DoesNotFit(
                f"`batch.micro_batch_size` must be one that fits in memory, but {job.plan.micro_batch} does not "
                f"({error.message}); lower it, or shard over more ranks"
            ) from None
        on_gpu = process.device.type == "cuda"
        gpu = gpu_from_device_name(device_name(process))
        ledger = MemoryModel(job.spec, job.groups, job.rendered, job.plan, gpu, cuda=on_gpu)
        predicted, measured = ledger.exactly(job.plan), meter.report()
        return {
            "rehearsed": True,
            "spec": job.spec.name,
            "backend": job.spec.backend.model_dump(mode="json"),
            "activation_checkpointing": job.spec.activation_checkpointing,
            "precision": job.spec.precision,
            "world_size": job.plan.world_size,
            "micro_batch_size": job.plan.micro_batch,
            "gradient_accumulation_steps": job.plan.accumulation,
            "global_batch_size": job.plan.global_batch,
            "sequence_length": job.plan.sequence_length,
            "tokens_per_step": job.plan.global_tokens,
            "flops_per_token": job.flops_per_token,
            "memory": measured,
            "predicted": memory_report(predicted),
            "measured_to_predicted": measured["peak_allocated_bytes"] / predicted.peak_allocated_bytes,
            # Counting tensors one by one takes most of a CPU's time.
            "compute_seconds": statistics.median(seconds[2:]) if on_gpu and len(seconds) > 2 else None,
            "environment": environment(1, device_name(process)),
        }


def lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    memory = report["memory"]
    found = [
        f"{report['spec']}: rank 0 of {report['world_size']}, {report['backend']['kind']}, micro-batch "
        f"{report['micro_batch_size']} x {report['sequence_length']}, {report['precision']}, on "
        f"{report['environment']['device']}; rehearsed: communication costs nothing, losses mean nothing",
        f"peak {format_bytes(memory['peak_allocated_bytes'])}, in {memory['peak_phase']} ({memory['method']})",
    ]
    predicted = report["predicted"]
    found.append(
        f"predicted {format_bytes(predicted['peak_allocated_bytes'])}, in {predicted['peak_phase']}: measured are "
        f"{report['measured_to_predicted']:.2%} of it".replace("%", " %")
    )
    found += [f"  {phase:<12} {format_bytes(count):>10}" for phase, count in memory["phases"].items()]
    if memory["parts"]:
        found.append("of the peak")
        found += [f"  {part:<14} {format_bytes(count):>10}" for part, count in memory["parts"].items()]
    for name, what in (("peak_reserved_bytes", "reserved"), ("device_used_bytes", "whole process and device")):
        if memory[name] is not None:
            found.append(f"{what} {format_bytes(memory[name])}")
    if report["compute_seconds"] is not None:
        found.append(f"this rank's own work takes {format_seconds(report['compute_seconds'])} a step")
    return found


def take_steps(
    job: Job, process: "Process", meter: "MemoryMeter", steps: int, micro_steps: int | None = None
) -> list[float]:
    """Build the engine and take steps of it on made-up samples; the seconds of each.

    With `micro_steps` each step takes no more than so many of its micro-batches; all of them are there. Raises
    Exhausted where this device has not enough memory.
    """
    import torch

    from scaling.engine.build import build_engine
    from scaling.labels import labelled
    from scaling.loop import train_step
    from scaling.models.build import model_recipe
    from scaling.objectives import build_objective
    from scaling.profile.stock import taking_stock

    spec = job.spec
    objective = build_objective(spec.objective, job.allow_import, from_logits=isinstance(spec.model, Recorded))
    recipe = model_recipe(spec, job.allow_import)
    with meter.phase("build"), taking_stock("build", process.device):
        engine = build_engine(spec, job.rendered, recipe, job.groups, process)
        with meter.category("optimizer"), engine.loading(engine.counters()):
            pass
        answered = _answered(job, engine, process, meter) if isinstance(spec.objective, PPO) else None
    seconds: list[float] = []
    stock = taking_stock("first_step", process.device, engine)
    with contextlib.closing(engine), stock, no_gc(), labelled(engine, meter):
        engine.module.train()
        for _ in range(steps):
            gc.collect()
            began = time.perf_counter()
            batches = _micro_batches(job, meter) if answered is None else next(answered)
            train_step(engine, objective, batches[:micro_steps], process, meter.clock, (False, False))
            del batches  # before the next are made
            if process.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return seconds


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    """Collections at random moments would free tensors in reference cycles now here, now there."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _micro_batches(job: Job, meter: "MemoryMeter") -> "list[Samples]":
    with meter.phase("data"):
        return [made_up(job.spec, job.plan.micro_batch) for _ in range(job.plan.accumulation)]


def _answered(job: Job, engine: "Engine", process: "Process", meter: "MemoryMeter") -> "Iterator[list[Samples]]":
    """The micro-batches of step after step for ppo: made-up prompts, as long as they may be, answered by the model,
    whose answers are as long as they may be too and worth nothing. Rollouts are a phase of the meter.
    """
    from scaling.models.build import model_recipe
    from scaling.rollouts import Rollouts, reference_weights
    from scaling.watch.heartbeat import NullHeartbeat

    spec, plan, objective = job.spec, job.plan, job.spec.objective
    assert isinstance(objective, PPO)
    shapes = {p.name: p.shape for p in parameters(spec.model, spec.lora)}
    with meter.category("other"):
        reference = reference_weights(engine, model_recipe(spec, job.allow_import), None, shapes)
    rollouts = Rollouts(
        *(engine, process, objective, plan, spec.seed, lambda _, answers, __: [0.0] * len(answers), reference),
        *(NullHeartbeat(), None),
        kept=0,
    )
    prompts = _made_up_prompts(spec, objective)
    batches = rollouts.batches(prompts, itertools.count(0, plan.global_batch), lambda *_, **__: None)

    def steps() -> "Iterator[list[Samples]]":
        while True:
            with meter.phase("rollout"):
                found = next(batches)
            meter.label("other", reference)  # which has been the model's meanwhile
            yield found
            del found

    return steps()


def _made_up_prompts(spec: Spec, objective: PPO) -> "PromptDataset":
    """A few random prompts, and no id that ends a response to them."""
    import numpy as np

    from scaling.data.chat import Conversations
    from scaling.data.prompts import PromptDataset
    from scaling.data.tokenizer import Tokenizer

    assert isinstance(spec.model, Decoder), "the spec refuses others"
    words, length, count = spec.model.vocab_size, spec.data.sequence_length - objective.max_new_tokens, 8
    tokens = np.random.default_rng(spec.seed).integers(words, size=count * length, dtype=np.uint32)
    told = Conversations("made up", tokens, np.arange(count + 1) * length)
    silent = Tokenizer("made up", words, lambda texts: [np.zeros(0, np.int64) for _ in texts], lambda _: "", None)
    return PromptDataset(told, np.arange(count), np.full(count, length), silent, np.array([words]))


def made_up_tokens(words: int, count: int, length: int) -> "MicroBatch":
    """So many random sequences of text."""
    import torch

    from scaling.data.dataset import MicroBatch

    inputs, targets = (torch.randint(words, (count, length)) for _ in range(2))
    return MicroBatch(inputs, targets)


def made_up_text(spec: Spec, words: int, count: int) -> "MicroBatch | PairBatch":
    """So many random samples of text, of the shapes that `spec` says."""
    import torch

    from scaling.data.dataset import PackedBatch, PairBatch

    length = spec.data.sequence_length
    made_up = made_up_tokens(words, count * sequences(spec), length)
    if sequences(spec) > 1:
        pairs = made_up.each(lambda tokens: tokens.view(count, 2, length))
        return PairBatch(pairs.inputs, pairs.targets, torch.zeros(count, 2))
    if not packs(spec.data):
        return made_up
    # Two texts to a sample.
    starts = torch.arange(length).ge(length // 2) * (length // 2)
    return PackedBatch(made_up.inputs, made_up.targets, starts.expand(count, length).contiguous())


def made_up(spec: Spec, count: int) -> "Samples":
    """So many random samples of the shapes that `spec` says."""
    import torch

    from scaling.data.dataset import ActionBatch
    from scaling.engine.precision import DTYPES

    model, length = spec.model, spec.data.sequence_length
    known = words(model)
    assert known is not None, "an inventory file says it"
    if not isinstance(model, AnyVla):
        return made_up_text(spec, known, count)
    vision, action = model.vision, model.action
    if caches_features(spec.data):
        images = torch.rand(count, *seen_shape(model)).to(DTYPES[spec.precision])
    else:
        size = (count, vision.views, vision.image_size, vision.image_size, CHANNELS)
        images = torch.randint(256, size, dtype=torch.uint8)
    return ActionBatch(
        images=images,
        instruction=torch.randint(known, (count, length)),
        state=torch.rand(count, action.state_dim),
        actions=torch.rand(count, action.chunk_size, action.action_dim),
        action_is_pad=torch.zeros(count, action.chunk_size, dtype=torch.bool),
        keys=torch.randint(2**62, (count,)),
    )


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.rehearse", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--spec", metavar="SPEC", help="a spec.json, a recipe's name, or - for stdin")
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field; repeatable")
    parser.add_argument("--world-size", type=positive, help="ranks of the run that is rehearsed")
    parser.add_argument("--steps", type=positive, default=3, help="optimizer steps (default 3); two of them warm up")
    parser.add_argument("--matrix", metavar="FILE", help="rehearse all that this JSON file lists")
    parser.add_argument("--json", metavar="FILE", help="write what was found there")
    add_allow_import(parser)
    return parser


if __name__ == "__main__":
    run_program(main)
