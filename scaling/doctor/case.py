"""A run as rules look at it: what several of them need, made once, and refused where the run cannot tell."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from scaling.batch import resolve_batch
from scaling.doctor.robust import rounded
from scaling.doctor.rule import CannotJudge
from scaling.errors import UserError
from scaling.hardware import GPU, Cluster, gpu_from_device_name, load_hardware
from scaling.spec import Spec, change_spec, parse_spec
from scaling.spec.document import assign, document_of
from scaling.spec.scan import JsonFault
from scaling.spec.sections import WSD
from scaling.summarize import RunData, at, is_number, trained_s

if TYPE_CHECKING:
    from scaling.estimate.search import Candidate, Found

LEAST = 20
"""Logged steps below which a curve is not judged: with fewer, the medians of its parts are of two or three values."""


@dataclass(frozen=True)
class Case:
    """A run, and whether the planner may be asked about it (seconds, for a large model)."""

    run: RunData
    ask_planner: bool = True

    # ------------------------------------------------------------ what was to be done

    @cached_property
    def spec(self) -> Spec:
        """The run's spec."""
        return self.changed({})

    def changed(self, changes: dict[str, Any]) -> Spec:
        """The run's spec after `--set` of `changes`. Raises CannotJudge where it is none."""
        from scaling.estimate.search import flags

        try:
            document = document_of("spec.json", json.dumps(self.run.spec))
            for assignment in flags(changes):
                assign(document, assignment)
            return parse_spec(document)
        except (UserError, JsonFault):
            raise CannotJudge("its spec.json is not one that this version takes") from None

    def takes(self, changes: dict[str, Any]) -> bool:
        """Whether the run's spec is still one, and runs on as many ranks, after `--set` of `changes`."""
        try:
            spec = self.changed(changes)
            if spec.batch.micro_batch_size != "auto":
                resolve_batch(spec, self.world_size)
        except (CannotJudge, UserError):
            return False
        return True

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        found = self.run.plan.get("world_size")
        return found if isinstance(found, int) and found > 0 else 1

    @cached_property
    def explicit(self) -> Spec:
        """The run's spec with the batch as it was cut, where the spec leaves that open."""
        micro, accumulation = self.batch
        sizes: dict[str, Any] = {"micro_batch_size": micro}
        if self.spec.batch.gradient_accumulation_steps != "auto":
            sizes["gradient_accumulation_steps"] = accumulation
        return change_spec(self.spec, batch=self.spec.batch.model_dump() | sizes)

    @property
    def batch(self) -> tuple[int, int]:
        """Micro-batch and accumulation of the run."""
        micro, accumulation = (self.run.plan.get(name) for name in ("micro_batch_size", "gradient_accumulation_steps"))
        if micro is None or accumulation is None:
            raise CannotJudge("its plan.json does not say how the batch was cut")
        return micro, accumulation

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return self.spec.schedule.warmup_steps

    @property
    def length(self) -> int:
        """Optimizer steps that the run is to take; as many as it took where the spec counts in epochs."""
        return self.spec.max_steps or self.last_step

    # ------------------------------------------------------------ what was done

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        if not self.run.steps:
            raise CannotJudge("no step is logged")
        return self.run.steps[-1]["step"]

    def losses(self, *, after: int = 0, least: int = LEAST) -> list[tuple[int, float]]:
        """Step and loss of the records beyond step `after`; CannotJudge where there are fewer than `least`."""
        found = [(step, loss) for step, loss in self.run.losses if step > after]
        return enough(found, least, f"finite losses after step {after}" if after else "finite losses")

    def values(self, *path: str, least: int = 5) -> list[float]:
        """What stands under `path` in the records whose times count; CannotJudge where there are fewer than `least`."""
        found = [value for value in (at(step, *path) for step in self.run.warm) if is_number(value)]
        return enough(found, least, f"records of {'.'.join(path)}")

    def shares(self, *path: str, least: int = 5) -> list[float]:
        """The same of seconds, over the step's."""
        pairs = [(at(step, *path), step.get("step_seconds")) for step in self.run.warm]
        found = [value / whole for value, whole in pairs if is_number(value) and is_number(whole) and whole > 0]
        return enough(found, least, f"records of {'.'.join(path)}")

    @cached_property
    def trained_s(self) -> float:
        """Seconds of the logged steps, those of crashes included, pauses left out."""
        return trained_s(self.run.lines)

    # ------------------------------------------------------------ the machine

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on GPUs."""
        return self.run.plan.get("device") not in (None, "cpu")

    def need_gpu(self) -> None:
        """CannotJudge where it ran on a CPU, whose ranks share cores, and which has none of a GPU's counters."""
        if not self.on_gpu:
            raise CannotJudge("it ran on a CPU")

    @cached_property
    def card(self) -> GPU:
        """The run's GPU, as `profile.hardware` measured it or as the table has it."""
        self.need_gpu()
        with suppress(UserError, CannotJudge):
            if self.spec.profile.hardware and not (own := load_hardware(self.spec.profile.hardware)).is_cpu:
                return own
        name = str(self.run.plan["device"])
        if (found := gpu_from_device_name(name)) is None:
            raise CannotJudge(f"{name[:60]} is not in the table of cards")
        return found

    @property
    def capacity(self) -> int:
        """Bytes of the card's memory."""
        if self.card.memory_bytes is None:
            raise CannotJudge(f"how much memory a {self.card.name} has is not known")
        return self.card.memory_bytes

    @cached_property
    def used_bytes(self) -> int:
        """The most memory that was in use on rank 0's device."""
        self.need_gpu()
        for name in ("device_used_bytes", "reserved_peak_bytes", "allocated_peak_bytes"):
            if (found := self.run.highest("memory", name)) is not None:
                return round(found)
        raise CannotJudge("no memory of the device is recorded")

    @property
    def cluster(self) -> Cluster:
        """What the run ran on, as the planner wants it."""
        starts = [event for event in self.run.events if event.get("event") == "start"]
        hosts = set(at(starts[-1], "details", "hosts") or ()) if starts else set()
        nodes = len(hosts) or 1
        if self.world_size % nodes or (not hosts and self.world_size > MOST_OF_A_NODE):
            raise CannotJudge("how its ranks lie on nodes is not recorded")
        return Cluster(nodes, self.world_size // nodes, self.card)

    # ------------------------------------------------------------ what the planner says

    @cached_property
    def planned(self) -> "Found":
        """Every way to run the spec on the run's machine; of the spec as it stands memory and speed are known."""
        if not self.ask_planner:
            raise CannotJudge("the planner was not asked; `python -m scaling.doctor` asks it")
        from scaling.estimate.search import search

        try:
            found = search(self.explicit, self.cluster)
        except UserError as error:
            raise CannotJudge(f"the planner cannot plan it: {error}") from None
        if found.as_written is None or found.as_written.speed is None:
            raise CannotJudge("how fast its card is is not known")
        return found

    def faster(self, gain: float, wanted: Callable[["Candidate"], bool]) -> "tuple[Candidate, float] | None":
        """The fastest way to run the spec that fits and is `wanted`, with what it gains; None if under `gain`.

        Predicted is compared with predicted. Where the run needed more memory than is predicted of it, another way is
        taken to need as much more than is predicted.
        """
        found, written = self.planned, self.planned.as_written
        assert written is not None and written.speed is not None
        excess = max(1.0, self.used_bytes / max(1, written.memory.device_used_bytes))
        for candidate in found.candidates:
            fits = candidate.fits and found.usable_bytes and candidate.memory.high_bytes * excess <= found.usable_bytes
            if fits and candidate.speed is not None and wanted(candidate):
                gained = candidate.speed / written.speed - 1
                return (candidate, gained) if gained >= gain else None
        return None


MOST_OF_A_NODE = 8
"""GPUs that are taken to be in one node where a run does not say how many nodes it had: what most nodes have."""


def enough(values: list[Any], least: int, what: str) -> list[Any]:
    """`values`; CannotJudge where there are fewer than `least`."""
    if len(values) < least:
        raise CannotJudge(f"{len(values)} {what}, {least} are needed")
    return values


def scaled_lr(spec: Spec, factor: float = 0.5) -> dict[str, Any]:
    """Every learning rate of the spec times `factor`."""
    rates = {f"param_groups.{i}.lr": group.lr for i, group in enumerate(spec.param_groups) if group.lr is not None}
    rates = {"optimizer.lr": spec.optimizer.lr, **rates}
    return {name: rounded(rate * factor, 2) for name, rate in rates.items()}


def longer_warm_up(case: Case) -> dict[str, Any]:
    """A warm-up two to four times as long, if a quarter of the run has room for it; else lower learning rates."""
    spec, before = case.spec, case.warmup_steps
    decay = spec.schedule.decay_steps if isinstance(spec.schedule, WSD) else 0
    after = min(max(4 * before, SHORTEST_WARM_UP), case.length // 4, case.length - decay)
    return {"schedule.warmup_steps": after} if after >= max(1, 2 * before) else scaled_lr(spec)


SHORTEST_WARM_UP = 100
"""Steps of the shortest warm-up that is advised: AdamW's second moment (beta 0.95 to 0.999) knows little before."""


def smaller_micro_batch(case: Case) -> dict[str, Any]:
    """The next smaller micro-batch that keeps the global batch, with its accumulation; {} at a micro-batch of 1."""
    micro, accumulation = case.batch
    per_rank = micro * accumulation
    smaller = next((size for size in range(micro - 1, 0, -1) if per_rank % size == 0), None)
    return {} if smaller is None else cut(case, smaller, per_rank // smaller)


def cut(case: Case, micro: int, accumulation: int) -> dict[str, Any]:
    """The batch cut in this way, as far as the spec says how: an accumulation that is "auto" follows."""
    changes = {"batch.micro_batch_size": micro}
    if case.spec.batch.gradient_accumulation_steps != "auto":
        changes["batch.gradient_accumulation_steps"] = accumulation
    return changes


def told(steps: Sequence[int], most: int = 3) -> str:
    """Steps in words: "step 40", "steps 40, 50 and 2 more"."""
    shown = ", ".join(f"{step:,}" for step in steps[:most])
    more = f" and {len(steps) - most:,} more" if len(steps) > most else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"
