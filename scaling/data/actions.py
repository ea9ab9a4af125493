"""Made demonstrations: images, instructions and states from which actions follow, and no file at all."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from scaling.data.dataset import ActionBatch
from scaling.data.hashing import derive, derive_each, uniform
from scaling.inventory import CHANNELS, instruction_words
from scaling.spec.sections import AnyVla

_TASKS = 4
"""Instructions there are, each of which wants another direction."""
_TEXTURE = 64
"""Grey levels of the texture of all images, over which each view has a colour of its own."""


@dataclass(frozen=True)
class SyntheticActions:
    """Actions a[step, j] = direction[task, j] * progress / 2 + state[j] / 2 + colour[j], indices wrapping around.

    The task is told by the instruction, the colour by the images; both and the state are pure functions of (seed,
    stream, index). With `masked_fraction` f, the share of a chunk that is padding, at its end, is drawn for each sample
    from a range within 0 .. min(1, 2 f) whose mean is f; at least one step of each sample stays.
    """

    seed: int
    stream: int
    """0 for training and 1 for validation."""
    samples: int
    model: AnyVla
    tokens: int
    """In an instruction."""
    masked_fraction: float = 0.0
    bytes_per_token: float | None = None
    terms_per_sample = None

    @property
    def fingerprint(self) -> str:
        vision, action = self.model.vision, self.model.action
        sizes = (vision.views, vision.image_size, instruction_words(self.model))
        return repr((self.stream, self.samples, *sizes, action.chunk_size, action.action_dim, self.masked_fraction))

    def __len__(self) -> int:
        return self.samples

    def read(self, indices: np.ndarray) -> ActionBatch:
        """The samples with these indices; see `Dataset.read`."""
        assert indices.min() >= 0 and indices.max() < self.samples, "index outside the dataset"
        action = self.model.action
        keys = derive_each(derive(self.seed, self.stream), indices.astype(np.uint64))
        tasks = (derive_each(1, keys) % np.uint64(_TASKS)).astype(np.int64)
        states = 2 * uniform(derive_each(2, keys), action.state_dim) - 1
        colours = uniform(derive_each(3, keys), self.model.vision.views * CHANNELS)
        return ActionBatch(
            images=torch.from_numpy(self._images(colours)),
            instruction=torch.from_numpy(self._instructions(tasks)),
            state=torch.from_numpy(states.astype(np.float32)),
            actions=torch.from_numpy(self._actions(tasks, states, colours)),
            action_is_pad=torch.from_numpy(self._padding(keys)),
            keys=torch.from_numpy(derive_each(5, keys).view(np.int64)),
        )

    def _images(self, colours: np.ndarray) -> np.ndarray:
        levels = (colours * (256 - _TEXTURE)).astype(np.uint8)
        return levels.reshape(len(colours), -1, 1, 1, CHANNELS) + self._texture

    @cached_property
    def _texture(self) -> np.ndarray:
        size = self.model.vision.image_size
        pixels = derive_each(derive(self.seed, 2), np.arange(size * size * CHANNELS, dtype=np.uint64))
        return (pixels % np.uint64(_TEXTURE)).astype(np.uint8).reshape(size, size, CHANNELS)

    def _instructions(self, tasks: np.ndarray) -> np.ndarray:
        return (tasks[:, None] + _TASKS * np.arange(self.tokens)) % instruction_words(self.model)

    def _actions(self, tasks: np.ndarray, states: np.ndarray, colours: np.ndarray) -> np.ndarray:
        action = self.model.action
        places = np.arange(action.action_dim)
        directions = 2 * uniform(derive_each(derive(self.seed, 3), np.arange(_TASKS, dtype=np.uint64)), len(places)) - 1
        progress = np.arange(1, action.chunk_size + 1) / action.chunk_size
        moving = directions[tasks][:, None, :] * progress[None, :, None]
        still = states[:, places % states.shape[1]] / 2 + colours[:, places % colours.shape[1]]
        return (moving / 2 + still[:, None, :]).astype(np.float32)

    def _padding(self, keys: np.ndarray) -> np.ndarray:
        size, fraction = self.model.action.chunk_size, self.masked_fraction
        low, high = max(0.0, 2 * fraction - 1), min(1.0, 2 * fraction)
        shares = low + (high - low) * uniform(derive_each(4, keys), 1)
        kept = np.maximum(1, np.ceil(size * (1 - shares)))
        return np.arange(size)[None, :] >= kept
