"""The model of transformers, from a folder as one downloads it."""

from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers.common import HUGGINGFACE, Job


class Model(nn.Module):
    """`model(inputs, targets)` is the mean cross-entropy."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(job.folder / HUGGINGFACE)
        self.model.train()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss


def load_model(job: Job) -> Model:
    """The model with the job's weights, on the host."""
    return Model(job)
