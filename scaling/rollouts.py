"""Responses that the model gives itself, to be trained on: sampling, and what each of their tokens is credited with.

At the first step of every `rollout_steps` x `epochs` the ranks answer the prompts of all of them, score the responses
with the model as it is and with the one that training started from, and share what came of it. That is kept in the run
folder until the steps are saved: a run that goes on trains on the very same responses.

The reference is no second model: its fp32 weights lie in host memory, each rank's own part, and take the place of the
model's for as long as it is asked.
"""

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from scaling.checkpoint.weights import WeightSource
from scaling.data.dataset import Dataset, MicroBatch, Samples
from scaling.data.hashing import derive, derive_each
from scaling.data.order import sample_indices
from scaling.data.prompts import PromptDataset
from scaling.engine.process import Process
from scaling.engine.protocol import Engine
from scaling.errors import StorageError
from scaling.models.decoder import KeyValues
from scaling.models.recipe import ModelRecipe
from scaling.objectives.policy import Reward, credit, whitened
from scaling.records import IGNORED, BatchPlan, ValidationRecord
from scaling.spec.sections import PPO
from scaling.watch.heartbeat import Heartbeat

logger = logging.getLogger("scaling")

FOLDER = "rollouts"
_SAMPLING, _MINI_BATCHES, _VALIDATION = 0x73616D70, 0x6D696E69, 0x76616C69
"""Of the keys of what is drawn: no other uses of the seed have these words."""
_GOLDEN, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""As in scaling/data/hashing.py, in 64 bits with a sign."""
_BEATS = 16
"""Tokens between two signs of life."""


@dataclass(frozen=True)
class ResponseBatch(MicroBatch):
    """Prompts and the responses to them, at the end of each row; the targets are the responses' tokens."""

    unit: ClassVar[str] = "tokens"
    starts: Tensor
    """Where each row's prompt begins, int64 [micro_batch, sequence]; what stands before it sees itself alone."""
    log_probabilities: Tensor
    """Of the targets, by the model that gave the response: fp32 [micro_batch, sequence], as all that follow."""
    values: Tensor
    """What that model foretold."""
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Answered:
    """Responses as they were sampled, on the device."""

    inputs: Tensor
    targets: Tensor
    starts: Tensor
    """As of `ResponseBatch`."""
    responses: list[np.ndarray]
    """Ids of each response, with what ends it."""


class Rollouts:
    """What a run trains on, step by step."""

    def __init__(
        self,
        engine: Engine,
        process: Process,
        spec: PPO,
        plan: BatchPlan,
        seed: int,
        reward: Reward,
        reference: list[Tensor],
        heartbeat: Heartbeat,
        folder: Path | None,
        *,
        kept: int,
    ) -> None:
        """`reference`: from `reference_weights`; `kept`: rollouts whose files stay."""
        self._engine, self._process, self._spec, self._plan, self._seed = engine, process, spec, plan, seed
        self._reward, self._reference, self._heartbeat = reward, reference, heartbeat
        self._folder = None if folder is None else folder / FOLDER
        self._kept = kept

    def batches(
        self, dataset: Dataset, first_samples: Iterator[int], tell: Callable[..., None]
    ) -> Generator[list[Samples], None, None]:
        """The micro-batches of this rank for each step whose first sample is given; collective calls.

        `tell(step, **facts)` hears of each rollout.
        """
        plan, steps = self._plan, self._spec.rollout_steps
        cycle, current = steps * self._spec.epochs, -1
        assert isinstance(dataset, PromptDataset), "ppo has no others"
        whole: ResponseBatch | None = None
        for first in first_samples:
            step = first // plan.global_batch
            if whole is None or step // cycle != current:
                current = step // cycle
                whole = self._read(current, step % cycle > 0) or self._answer(dataset, current, step, tell)
            epoch, part = divmod(step % cycle, steps)
            order = _order(steps * plan.global_batch, derive(self._seed, _MINI_BATCHES, current, epoch))
            own = order[part * plan.global_batch :][: plan.global_batch]
            yield [self._micro_batch(whole, own, index) for index in range(plan.accumulation)]

    def validate(self, dataset: Dataset, samples: int, step: int) -> ValidationRecord:
        """What responses to held-out prompts are worth, always the same ones; the loss is minus their mean reward."""
        assert isinstance(dataset, PromptDataset), "ppo has no others"
        began, samples = time.perf_counter(), min(samples, len(dataset))
        chosen = sample_indices(0, samples, len(dataset), seed=0)
        found = self._answer_all(dataset, chosen, derive(self._seed, _VALIDATION))
        reward, tokens = float(found["reward"].mean()), int((found["targets"] != IGNORED).sum())
        measures = {"reward": reward, "response_tokens": tokens / samples}
        seconds = time.perf_counter() - began
        return ValidationRecord(step, -reward, None, samples, seconds, time.time(), "responses", measures)

    # ------------------------------------------------------------ one rollout

    def _answer(self, dataset: PromptDataset, number: int, step: int, tell: Callable[..., None]) -> ResponseBatch:
        """Answer the prompts of a rollout, and keep what comes of it."""
        plan, spec = self._plan, self._spec
        count = spec.rollout_steps * plan.global_batch
        first = number * count
        indices = sample_indices(first, count, len(dataset), self._seed)
        found = self._answer_all(dataset, indices, derive(self._seed, _SAMPLING, first), scored=True)
        counted = found["targets"] != IGNORED
        away = torch.where(counted, found["log_probabilities"] - found["reference"], 0.0)
        rewards = -spec.kl_coef * away
        last = (counted * torch.arange(counted.shape[1])).argmax(dim=1)
        rewards[torch.arange(count), last] += found["reward"]
        advantages, returns = credit(rewards, found["values"], counted, spec.gamma, spec.lam)
        whole = ResponseBatch(
            found["inputs"],
            found["targets"],
            found["starts"],
            found["log_probabilities"],
            found["values"],
            whitened(advantages, counted),
            returns,
        )
        facts = {
            "reward": float(found["reward"].mean()),
            "kl": float(away.sum() / count),
            "response_tokens": float(counted.sum() / count),
        }
        self._process.on_main(lambda: self._write(number, whole))
        tell(step, **facts)
        if self._process.is_main:
            logger.info(
                f"{count} responses before step {step + 1}: reward {facts['reward']:.4f}  KL {facts['kl']:.4f}  "
                f"{facts['response_tokens']:.1f} tokens each"
            )
        return whole

    def _answer_all(
        self, dataset: PromptDataset, indices: np.ndarray, key: int, *, scored: bool = False
    ) -> dict[str, Tensor]:
        """Each rank answers its share; what all have found, on the host, in the order of `indices`. `scored`: with
        what the model and the reference make of each token."""
        engine, process, micro = self._engine, self._process, self._plan.micro_batch
        keys = derive_each(key, np.arange(len(indices), dtype=np.uint64)).view(np.int64)
        shares = -(-len(indices) // (micro * process.world_size))
        places = [(share * process.world_size + process.rank) * micro + np.arange(micro) for share in range(shares)]
        safe = [np.minimum(own, len(indices) - 1) for own in places]  # who has none answers another's, for nothing
        engine.module.eval()
        with torch.no_grad():
            answered = [self._sample(dataset, indices[own], torch.from_numpy(keys[own])) for own in safe]
            parts = [{"inputs": one.inputs, "targets": one.targets, "starts": one.starts} for one in answered]
            if scored:
                for part in parts:
                    losses, values = self._by_token(part)
                    part |= {"log_probabilities": -losses, "values": values}
                with self._as_reference():
                    for part in parts:
                        part["reference"] = -self._by_token(part)[0]
        engine.module.train()
        for part, one, own in zip(parts, answered, safe, strict=True):
            part["reward"] = torch.tensor(self._rewards(dataset, indices[own], one.responses), dtype=torch.float32)
        mine = np.concatenate(places)
        told = {name: torch.cat([part[name].cpu() for part in parts]).numpy() for name in parts[0]}
        return _merged(process.gather_objects((mine, told)), len(indices))

    def _rewards(self, dataset: PromptDataset, indices: np.ndarray, responses: Sequence[np.ndarray]) -> list[float]:
        prompts = [dataset.told(dataset.prompt(index)) for index in indices.tolist()]
        expected = [dataset.expected(index) for index in indices.tolist()]
        return self._reward(prompts, [dataset.told(ids) for ids in responses], expected)

    def _by_token(self, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self._heartbeat.part()
        losses, values = self._engine.module(part["inputs"], part["targets"], part["starts"], by_token=True)
        return losses, values

    # ------------------------------------------------------------ sampling

    def _sample(self, dataset: PromptDataset, indices: np.ndarray, keys: Tensor) -> Answered:
        """Answer these prompts, as many tokens for each as the longest response may have."""
        process = self._process
        prompts = [dataset.prompt(index) for index in indices.tolist()]
        # As long on all ranks: collectives are in every forward pass.
        longest = max(process.gather_objects(max(map(len, prompts))))
        rows = np.zeros((len(prompts), longest), np.int64)
        starts = np.tile(np.arange(longest), (len(prompts), 1))  # what fills up sees itself alone
        for row, prompt in enumerate(prompts):
            rows[row, longest - len(prompt) :] = prompt
            starts[row, longest - len(prompt) :] = longest - len(prompt)
        tokens = self._generate(torch.from_numpy(rows), torch.from_numpy(starts), keys, dataset.stop)
        responses = [_until(ids, dataset.stop) for ids in tokens.cpu().numpy()]
        total = self._plan.sequence_length
        inputs, targets = np.zeros((len(prompts), total), np.int64), np.full((len(prompts), total), IGNORED, np.int64)
        begins = np.tile(np.arange(total), (len(prompts), 1))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            ids = np.concatenate([prompt, response])
            assert len(ids) <= total, "prompts leave room"
            first = total - len(ids) + 1
            inputs[row, first:], targets[row, total - len(response) :] = ids[:-1], response
            begins[row, first:] = first
        inputs, targets, begins = (torch.from_numpy(part).to(process.device) for part in (inputs, targets, begins))
        return Answered(inputs, targets, begins, responses)

    def _generate(self, rows: Tensor, starts: Tensor, keys: Tensor, stop: np.ndarray) -> Tensor:
        """Sampled ids, int64 [rows, tokens], of which those after a response's end mean nothing.

        `rows` and `starts`: int64 [rows, prompt]. What is drawn is a function of a row's key and the token's place.
        """
        module, device, spec = self._engine.module, self._process.device, self._spec
        longest, layers = rows.shape[1] + spec.max_new_tokens, _layers(module)
        memory = [KeyValues(longest) for _ in range(layers)]
        rows, starts, keys = rows.to(device), starts.to(device), keys.to(device)
        ending = torch.from_numpy(stop).to(device)
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        found: list[Tensor] = []
        for place in range(spec.max_new_tokens):
            logits = module(rows, starts=starts, memory=memory)[:, -1].float() / spec.temperature
            chosen = (logits + _gumbel(keys, place, logits.shape[1])).argmax(dim=1)
            found.append(chosen)
            rows, starts = chosen.unsqueeze(1), starts[:, -1:]
            if len(found) >= len(stop):
                done |= (torch.stack(found[-len(stop) :], dim=1) == ending).all(dim=1)
            if place % _BEATS == 0:
                self._heartbeat.part()
                if not float(self._process.sum_over_ranks((~done).sum().float())):
                    break
        return torch.stack(found, dim=1)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Have the model's weights be the reference's inside; outside they are what they were, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Write what lies on the host over the masters, and have what they were lie there."""
        engine, held = self._engine, self._reference
        with engine.loading(engine.counters()):
            masters = (shard for shard in engine.state() if shard.kind == "master")
            for shard, place in zip(masters, range(len(held)), strict=True):  # one at a time: no second copy of all
                own = shard.values.detach().to("cpu", torch.float32, copy=True)
                shard.values.copy_(held[place])
                held[place] = own

    # ------------------------------------------------------------ keeping

    def _micro_batch(self, whole: ResponseBatch, own: np.ndarray, index: int) -> ResponseBatch:
        plan, process = self._plan, self._process
        first = (index * process.world_size + process.rank) * plan.micro_batch
        rows = torch.from_numpy(own[first : first + plan.micro_batch])
        return whole.each(lambda tensor: tensor[rows])

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"rollout-{number:08d}.npz"

    def _write(self, number: int, whole: ResponseBatch) -> None:
        if self._folder is None:
            return
        path = self._path(number)
        arrays = {part.name: getattr(whole, part.name).numpy() for part in fields(whole)}
        try:
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)
            for old in path.parent.glob("rollout-*.npz"):
                found = re.fullmatch(r"rollout-(\d{8})\.npz", old.name)
                if found and int(found[1]) <= number - self._kept:
                    old.unlink()
        except OSError as error:
            raise StorageError(f"{path} must be writable, but is not: {error.strerror or error}; free space") from error

    def _read(self, number: int, in_midst: bool) -> ResponseBatch | None:
        """The responses of a rollout in the midst of which a run goes on; None where there are none."""
        if not in_midst or self._folder is None:
            return None
        try:
            with np.load(self._path(number), allow_pickle=False) as found:
                parts = [torch.from_numpy(found[part.name]) for part in fields(ResponseBatch)]
        except (OSError, ValueError, KeyError, EOFError) as error:
            if self._process.is_main:
                logger.warning(
                    f"WARNING: {self._path(number)} cannot be read ({error}): its prompts are answered again, by the "
                    "model as it is now"
                )
            return None
        return ResponseBatch(*parts)


def reference_weights(
    engine: Engine, recipe: ModelRecipe, weights: WeightSource | None, shapes: Mapping[str, Sequence[int]]
) -> list[Tensor]:
    """This rank's part of what training starts from, fp32 on the host, in the order of the engine's masters.

    From `weights`, or where they lack a parameter from the recipe's initial values.
    """
    found: list[Tensor] = []
    names = set() if weights is None else set(weights.names())
    made: dict[str, Tensor] = {}
    for shard in engine.state():
        if shard.kind != "master":
            continue
        count = shard.values.numel()
        if weights is not None and shard.name in names:
            found.append(weights.read(shard.name, shard.start, count).float().clone())
            continue
        if shard.name not in made:  # one at a time: a whole tensor
            made = {shard.name: recipe.initial_value(shard.name, torch.Size(shapes[shard.name])).flatten()}
        found.append(made[shard.name][shard.start : shard.start + count].clone())
    return found


def _layers(module: torch.nn.Module) -> int:
    """Blocks of a decoder, however it is wrapped."""
    return next(len(inner.layers) for inner in module.modules() if hasattr(inner, "lm_head"))  # pyright: ignore


def _until(ids: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """A response up to and with what ends it; all of it where nothing does."""
    for place in range(len(stop), len(ids) + 1):
        if np.array_equal(ids[place - len(stop) : place], stop):
            return ids[:place]
    return ids


def _gumbel(keys: Tensor, place: int, count: int) -> Tensor:
    """Gumbel noise for each key (int64 [rows]) and id, fp32 [rows, count]: the highest sum of it and a logit is a draw
    from the softmax (Gumbel, 1954). A function of key and place: as many draws as one likes, on any device."""
    places = torch.arange(count, device=keys.device) * _GOLDEN
    bits = _mix(_mix(keys + place).unsqueeze(1) + places)
    uniform = (((bits >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log().float()


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser, whose products wrap around."""
    values = (values ^ ((values >> 30) & (2**34 - 1))) * _FIRST
    values = (values ^ ((values >> 27) & (2**37 - 1))) * _SECOND
    return values ^ ((values >> 31) & (2**33 - 1))


def _order(count: int, key: int) -> np.ndarray:
    """A permutation of 0 .. count-1, int64."""
    return np.argsort(derive_each(key, np.arange(count, dtype=np.uint64)), kind="stable")


def _merged(everyone: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]], count: int) -> dict[str, Tensor]:
    """Rows of all ranks, in order; what stands at places beyond the last is dropped."""
    places = np.concatenate([mine for mine, _ in everyone])
    order = np.argsort(places, kind="stable")[:count]
    return {
        name: torch.from_numpy(np.concatenate([told[name] for _, told in everyone])[order]) for name in everyone[0][1]
    }
