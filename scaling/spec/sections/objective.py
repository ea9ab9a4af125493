"""What is minimised."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from scaling.spec.sections.base import Count, NonNegative, Positive, Section, Size, Target, Text


class CausalLM(Section):
    """Next-token prediction: cross-entropy summed over the target tokens of the whole step, divided by their number."""

    kind: Literal["causal_lm"] = "causal_lm"
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """chunked: logits exist for a slice of the tokens at a time (least memory); plain: for the whole micro-batch, as it
    always is for models of the kinds factory and huggingface."""


class SFT(Section):
    """Supervised fine-tuning on conversations: as causal_lm, with what the assistant says as the only targets."""

    kind: Literal["sft"]
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """As of causal_lm."""


class DPO(Section):
    """Direct preference optimisation (Rafailov et al., 2023): of two responses the chosen one is made more probable,
    compared with the model that training starts from, than the rejected one; the loss is the mean over pairs."""

    kind: Literal["dpo"]
    beta: Positive = 0.1
    """How closely the model is held to the one it starts from; larger is closer. Default: as the paper and trl."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are taken to have been swapped by mistake (cDPO). Default: none."""
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """As of causal_lm; chunked logits are computed a second time in the backward pass."""


class Factory(Section):
    """Code of your own: the function `target` is called with `arguments`. Its package must be allowed on the command
    line (--allow-import); a spec cannot do that."""

    kind: Literal["factory"]
    target: Target
    """Where the function is, "package.module:function"; the working folder is looked in first. As an objective it
    returns a function of (module, micro-batch) to the loss summed over the target tokens."""
    arguments: dict[str, Any] = {}
    """Its keyword arguments."""


class Overlap(Section):
    """Reward: how much of the expected answer, the assistant's last words in the data, a response has; the F1 of their
    words, 0 to 1, each word counted as often as it stands there (as SQuAD; Rajpurkar et al., 2016)."""

    kind: Literal["overlap"]


class Pattern(Section):
    """Reward: 1 where a regular expression is found in the response, else 0."""

    kind: Literal["pattern"]
    pattern: Text
    """As Python's `re.search` has it; `.` also matches line breaks."""

    def contradictions(self) -> Iterator[str]:
        try:
            re.compile(self.pattern)
        except (re.error, RecursionError) as error:
            yield f"`pattern` must be a regular expression, but is not: {error}; correct it"


class PPO(Section):
    """Proximal policy optimisation (Schulman et al., 2017) of sampled responses to the prompts of `data`: all before
    the assistant's last words. The reward comes with the last token; each token pays for what it is more probable than
    by the model that training starts from (Ziegler et al., 2019). The loss is the mean over response tokens."""

    kind: Literal["ppo"]
    reward: Annotated[Overlap | Pattern | Factory, Field(discriminator="kind")]
    """What a response is worth. A factory returns a function of (prompts, responses), lists of texts, to a list of
    numbers."""
    max_new_tokens: Size
    """Longest response, tokens; prompts may have what that leaves of `data.sequence_length`."""
    temperature: Positive = 1.0
    """What logits are divided by, in sampling alone."""
    rollout_steps: Count = 4
    """Optimizer steps whose prompts are answered at a time, by the model as it is then."""
    epochs: Count = 1
    """How often each such set of responses is gone through."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """A token's probability earns nothing beyond this change of it. Default: as the paper."""
    value_clip: Positive = 0.2
    """The same of the value, absolute. Default: as trl."""
    value_coef: NonNegative = 0.5
    """Weight of the value's squared error. Default: as the paper's for shared weights."""
    kl_coef: NonNegative = 0.05
    """Price of a nat away from the model that training starts from. Default: as trl."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a reward for each token that it lies ahead. Default: none, as usual for responses."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation (Schulman et al., 2016). Default: as the paper."""
    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """As of dpo."""


class BehaviourCloning(Section):
    """Actions as a demonstrator's: the error summed over the numbers of all actions that are no padding, over the whole
    step, divided by how many they are."""

    kind: Literal["behaviour_cloning"]
    loss: Literal["regression", "flow_matching"] = "regression"
    """regression: the distance of the predicted actions; flow_matching: the squared error of the predicted velocity
    from noise to actions, at a time and noise drawn by seed and place in the data (Lipman et al., 2023)."""
    error: Literal["l1", "mse"] | None = None
    """Of a regression: absolute or squared. Default: l1, as ACT (Zhao et al., 2023)."""

    def contradictions(self) -> Iterator[str]:
        if self.loss == "flow_matching" and self.error is not None:
            yield f'`error` must be absent for the loss "flow_matching", but is "{self.error}"; drop it'


Objective = Annotated[CausalLM | SFT | DPO | PPO | BehaviourCloning | Factory, Field(discriminator="kind")]


def in_chunks(objective: Objective) -> bool:
    """Whether a decoder's loss takes a slice of the tokens at a time: for code of one's own it does."""
    return not isinstance(objective, CausalLM | SFT | DPO | PPO) or objective.cross_entropy == "chunked"
