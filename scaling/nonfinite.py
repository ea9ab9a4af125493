"""What follows a step whose loss or gradient was not finite. Every rank sees the same and decides the same."""

import logging
from dataclasses import dataclass
from typing import Literal

from scaling.errors import NonFinite
from scaling.profile.recorder import Landed

logger = logging.getLogger("scaling")


class GoBack(Exception):
    """The run is to go back to its last checkpoint, and later pass over the samples of this step."""

    def __init__(self, step: int, first_sample: int) -> None:
        super().__init__(step, first_sample)
        self.step = step
        self.first_sample = first_sample


@dataclass
class NonFinitePolicy:
    """`on_nonfinite` of the spec. Steps that only find fp16's loss scale are none of its business."""

    action: Literal["stop", "skip", "rollback"]
    limit: int
    """Steps in a row that `skip` and `rollback` put up with."""
    in_a_row: int = 0
    furthest: int = 0
    """The last step that was finite; one that is done again after going back says nothing new."""

    def take(self, landed: Landed, *, is_main: bool) -> None:
        """Take note of a step. Raises NonFinite or GoBack, on all ranks alike."""
        if landed.scaled_too_far:
            return
        if not landed.refused:
            if landed.step > self.furthest:
                self.furthest, self.in_a_row = landed.step, 0
            return
        self.in_a_row += 1
        found = _found(landed)
        if self.action == "stop" or self.in_a_row > self.limit:
            rank = landed.bad_ranks[0] if landed.bad_ranks else None
            often = f" ({self.in_a_row} such steps in a row)" if self.in_a_row > 1 else ""
            raise NonFinite(_message(landed, found + often), step=landed.step, rank=rank)
        if is_main:
            logger.warning(f"WARNING: step {landed.step} was not applied on any rank: {found}")
        if self.action == "rollback":
            raise GoBack(landed.step, landed.first_sample)


def _found(landed: Landed) -> str:
    if landed.bad_ranks:
        ranks = f"rank{'s' if len(landed.bad_ranks) > 1 else ''} {', '.join(map(str, landed.bad_ranks))}"
        return f"the loss of {ranks} is not finite (over all ranks it is {landed.loss})"
    return f"the gradient is not finite (norm {landed.grad_norm}) though the loss of every rank is ({landed.loss:.6g})"


def _message(landed: Landed, found: str) -> str:
    return (
        f"`loss` and gradient must be finite, but at step {landed.step} {found}; the update was not applied. Lower "
        "`optimizer.lr`, lengthen `schedule.warmup_steps`, set `on_nonfinite`, or look at the samples of that step "
        f"({landed.first_sample} and on in the order of the data)"
    )
