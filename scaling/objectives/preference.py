"""Losses of pairs: how much more probable the chosen response has become than the rejected one."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.records import IGNORED


@dataclass(frozen=True)
class PreferenceLoss:
    """Direct preference optimisation (Rafailov et al., 2023, eq. 7), with label smoothing (Mitchell, 2023)."""

    beta: float
    label_smoothing: float
    from_logits: bool = False
    """The module returns logits, where this project's own take targets and return what these cost."""

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """The loss summed over pairs."""
        return self._losses(self.margins(module, batch), batch).sum()

    def measures(self, module: nn.Module, batch: Any) -> dict[str, Tensor]:
        """For a validation, sums over pairs: of the loss; "accuracy": 1 where the chosen one gained more than the
        rejected one (a tie is a half); "margin": beta times by how much more, nats."""
        margins = self.margins(module, batch)
        counted = batch.counted()
        right = (margins > 0).float() + 0.5 * (margins == 0).float()
        return {
            "loss": self._losses(margins, batch).sum(),
            "accuracy": torch.where(counted, right, 0.0).sum(),
            "margin": torch.where(counted, self.beta * margins, 0.0).sum(),
        }

    def margins(self, module: nn.Module, batch: Any) -> Tensor:
        """By how many nats the chosen response has gained on the rejected one since training began, fp32 [pairs]."""
        gained = log_probabilities(module, batch, from_logits=self.from_logits) - batch.reference
        return gained[:, 0] - gained[:, 1]

    def _losses(self, margins: Tensor, batch: Any) -> Tensor:
        scaled = self.beta * margins
        losses = -(1 - self.label_smoothing) * F.logsigmoid(scaled) - self.label_smoothing * F.logsigmoid(-scaled)
        return torch.where(batch.counted(), losses, 0.0)


def log_probabilities(module: nn.Module, batch: Any, *, from_logits: bool = False) -> Tensor:
    """Of the targets of each sequence of each pair, fp32 [pairs, 2]; `from_logits` as of `PreferenceLoss`."""
    inputs, targets = batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1)
    if not from_logits:
        return -module(inputs, targets, by_sequence=True).view(-1, 2)
    output = module(inputs)
    logits = getattr(output, "logits", output).float()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return -losses.sum(dim=1).view(-1, 2)
