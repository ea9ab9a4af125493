"""The batch triangle is exact or refused, and a refusal names values that work."""

import math
import re
from itertools import product
from typing import Any

import pytest

from scaling.batch import check_world_size, legal_world_sizes, resolve_batch
from scaling.errors import UserError
from scaling.records import BatchPlan
from scaling.spec.sections import DDP, FSDP, Batch, Decoder, DeepSpeed, Single, Spec

SEQUENCE = 1024


def spec(backend: Any = None, **batch: Any) -> Spec:
    return Spec(
        name="test",
        model=Decoder(
            kind="decoder",
            vocab_size=256,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=SEQUENCE,
        ),
        data={"kind": "synthetic", "sequence_length": SEQUENCE},  # type: ignore[arg-type]
        optimizer={"lr": 1e-3},  # type: ignore[arg-type]
        batch=Batch(**batch),
        backend=backend or DDP(kind="ddp"),
        max_steps=10,
    )


def refusal(job: Spec, world_size: int) -> str:
    with pytest.raises(UserError) as caught:
        resolve_batch(job, world_size)
    assert caught.value.code == 2
    return str(caught.value)


def triples(message: str) -> list[tuple[int, int, int]]:
    """(micro, ranks, accumulation) of everything a message suggests."""
    found = re.findall(r"(\d+) micro x (\d+) ranks? x (\d+) accumulation", message)
    return [(int(micro), int(ranks), int(steps)) for micro, ranks, steps in found]


@pytest.mark.parametrize(
    "batch",
    [
        {"global_batch_size": 480, "micro_batch_size": 12},
        {"global_batch_size": 480, "gradient_accumulation_steps": 5},
        {"global_batch_size": 480, "micro_batch_size": 12, "gradient_accumulation_steps": 5},
        {"micro_batch_size": 12, "gradient_accumulation_steps": 5},
        {"global_batch_size": "auto", "micro_batch_size": 12, "gradient_accumulation_steps": 5},
        {"global_batch_tokens": 480 * SEQUENCE, "micro_batch_size": 12},
        {"global_batch_tokens": 480 * SEQUENCE, "gradient_accumulation_steps": 5},
    ],
)
def test_any_one_of_the_three_may_be_open(batch: dict[str, Any]) -> None:
    plan = resolve_batch(spec(**batch), 8)
    assert plan == BatchPlan(480, 12, 5, 8, SEQUENCE)
    assert plan.sentence == "480 = 12 micro x 8 ranks x 5 accumulation"
    assert plan.global_tokens == 491520


def test_the_global_batch_stays_when_the_world_size_changes() -> None:
    job = spec(global_batch_size=480, micro_batch_size=12)
    assert [resolve_batch(job, ranks).accumulation for ranks in (1, 2, 4, 8, 40)] == [40, 20, 10, 5, 1]


def test_a_wrong_sum_is_shown_with_its_numbers_and_the_nearest_that_work() -> None:
    message = refusal(spec(global_batch_size=500, micro_batch_size=12, gradient_accumulation_steps=5), 8)
    assert message.startswith(
        "`batch.global_batch_size` must be micro_batch_size x world size x gradient_accumulation_steps "
        "= 12 x 8 x 5 = 480, but is 500; the nearest that work: 480 = 12 micro x 8 ranks x 5 accumulation; "
        "576 = 12 micro x 8 ranks x 6 accumulation; or keep 500 with "
    )


def test_a_right_global_batch_with_a_wrong_accumulation_can_be_kept() -> None:
    message = refusal(spec(global_batch_size=480, micro_batch_size=12, gradient_accumulation_steps=4), 8)
    assert "384 = 12 micro x 8 ranks x 4 accumulation" in message
    assert "or keep 480 with 12 micro x 8 ranks x 5 accumulation or 15 micro x 8 ranks x 4 accumulation" in message
    assert "start 10 processes" in message


def test_nothing_is_floored() -> None:
    message = refusal(spec(global_batch_size=500, micro_batch_size=12), 8)
    assert "a multiple of micro_batch_size x world size = 12 x 8 = 96, but is 500" in message
    assert "480 = 12 micro" in message and "576 = 12 micro" in message


def test_a_global_batch_below_one_micro_batch_a_rank() -> None:
    # DeepSpeed's own arithmetic ends in an accumulation of 0 here.
    message = refusal(spec(global_batch_size=3, micro_batch_size=4), 1)
    assert "4 = 4 micro x 1 rank x 1 accumulation" in message
    assert "keep 3 with 3 micro x 1 rank x 1 accumulation" in message
    assert "0 accumulation" not in message and "0 =" not in message


def test_the_world_size_as_the_culprit() -> None:
    message = refusal(spec(global_batch_size=480, micro_batch_size=12), 7)
    assert "keep every size and start 5 or 8 processes" in message


def test_tokens_in_place_of_sequences() -> None:
    message = refusal(spec(global_batch_tokens=524288, micro_batch_size=12), 8)
    assert "micro_batch_size x world size x data.sequence_length = 12 x 8 x 1024 = 98304, but is 524288" in message
    assert "491520 tokens (480 = 12 micro x 8 ranks x 5 accumulation)" in message
    assert "keep 524288 with 8 micro x 8 ranks x 8 accumulation" in message
    uneven = refusal(spec(global_batch_tokens=500_000, micro_batch_size=12), 8)
    assert "491520 tokens" in uneven and "589824 tokens" in uneven
    assert "no multiple of data.sequence_length (1024)" in uneven and "keep" not in uneven


def test_every_suggestion_works() -> None:
    cases = product([1, 2, 3, 7, 8, 12, 64, 1000], [1, 7, 96, 97, 480, 500], ["auto", 1, 12, 13], ["auto", 1, 5])
    for world_size, whole, micro, steps in cases:
        if micro == steps == "auto":
            continue
        job = spec(global_batch_size=whole, micro_batch_size=micro, gradient_accumulation_steps=steps)
        try:
            plan = resolve_batch(job, world_size)
        except UserError as error:
            message = str(error)
            assert triples(message), message
            for suggested in triples(message):
                sizes = dict(micro_batch_size=suggested[0], gradient_accumulation_steps=suggested[2])
                other = spec(global_batch_size=suggested[0] * suggested[1] * suggested[2], **sizes)
                assert resolve_batch(other, suggested[1]).micro_batch == suggested[0] >= 1
            for total, *suggested in re.findall(r"(\d+) = (\d+) micro x (\d+) ranks? x (\d+) acc", message):
                assert int(total) == math.prod(int(number) for number in suggested)
            for kept in message.partition(" or keep ")[2].partition(";")[0].split(" with ")[1:]:
                assert all(math.prod(numbers) == whole for numbers in triples(kept))
            for starts in re.findall(r"start ([\d or]+) processes", message):
                assert all(resolve_batch(job, int(size)).global_batch == whole for size in starts.split(" or "))
        else:
            assert plan.global_batch == whole == plan.micro_batch * plan.accumulation * world_size
            assert micro in ("auto", plan.micro_batch) and steps in ("auto", plan.accumulation)


def test_the_largest_batch_is_refused_at_once() -> None:
    refusal(spec(global_batch_size=2**40, micro_batch_size=13), 8)


def test_legal_world_sizes() -> None:
    job = spec(global_batch_size=480, micro_batch_size=12)
    assert legal_world_sizes(job, 64) == (1, 2, 4, 5, 8, 10, 20, 40)
    assert legal_world_sizes(spec(micro_batch_size=3, gradient_accumulation_steps=1), 3) == (1, 2, 3)
    assert legal_world_sizes(spec(Single(kind="single"), global_batch_size=480, micro_batch_size=12), 64) == (1,)
    hybrid = spec(FSDP(kind="fsdp", replicate=4), global_batch_size=480, micro_batch_size=12)
    assert legal_world_sizes(hybrid, 64) == (4, 8, 20, 40)
    assert legal_world_sizes(spec(global_batch_tokens=1025, micro_batch_size=1), 64) == ()


@pytest.mark.parametrize(
    ("backend", "world_size", "words"),
    [
        (DDP(kind="ddp"), 0, ["world size must be at least 1, but is 0"]),
        (DDP(kind="ddp"), -1, ["but is -1"]),
        (Single(kind="single"), 8, ["`backend.kind` must be", "world size of 8", 'but is "single"', "one process"]),
        (FSDP(kind="fsdp", replicate=3), 8, ["`backend.replicate`", "(8), but is 3; use 2 or 4, or start 9 or 6"]),
        (FSDP(kind="fsdp", replicate=16), 8, ["but is 16; use 8, or start 16 processes"]),
        (
            DeepSpeed(kind="deepspeed", zero_stage=3, zero_hpz_partition_size=8),
            4,
            ["`backend.zero_hpz_partition_size` must divide the world size (4), but is 8; use 4, or start 8 processes"],
        ),
    ],
)
def test_world_sizes_that_the_backend_cannot_run_on(backend: Any, world_size: int, words: list[str]) -> None:
    job = spec(backend, micro_batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(UserError) as caught:
        check_world_size(job, world_size)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert refusal(job, world_size) == str(caught.value)


@pytest.mark.parametrize(
    ("backend", "world_size"),
    [
        (Single(kind="single"), 1),
        (DDP(kind="ddp"), 1),
        (FSDP(kind="fsdp", replicate=8), 8),
        (DeepSpeed(kind="deepspeed", zero_stage=2), 3),
        (DeepSpeed(kind="deepspeed", zero_stage=3, zero_hpz_partition_size=8), 16),
    ],
)
def test_world_sizes_that_it_can(backend: Any, world_size: int) -> None:
    check_world_size(spec(backend, micro_batch_size=1, gradient_accumulation_steps=1), world_size)
