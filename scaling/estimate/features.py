"""What is kept on disk of a frozen vision's answers, before it is there."""

import json
from dataclasses import dataclass
from pathlib import Path

from scaling.inventory import CHECKSUM_BYTES, feature_bytes
from scaling.spec.sections import SIMULATED_ARM, AnyVla, EpisodeData, Spec

INFO = "meta/info.json"
"""Of a folder of demonstrations: among other things how many moments they have (LeRobot's layout)."""


@dataclass(frozen=True)
class FeatureCache:
    """The files in `data.cache` of one vision and one precision."""

    folder: str
    bytes_per_sample: int
    samples: int | None
    """Moments of all folders, training and validation; None where one of them is not here, or does not say it."""
    total_bytes: int | None


def feature_cache(spec: Spec) -> FeatureCache | None:
    """What `data.cache_features` takes; None where it is not set."""
    model, data = spec.model, spec.data
    if not (isinstance(model, AnyVla) and isinstance(data, EpisodeData) and data.cache_features):
        return None
    each = feature_bytes(model, spec.precision) + CHECKSUM_BYTES
    held_out = data.validation if isinstance(data.validation, list) else []
    names = dict.fromkeys([*data.train, *held_out])
    counts = [_moments(Path(data.simulated_folder if name == SIMULATED_ARM else name)) for name in names]
    known = [count for count in counts if count is not None]
    samples = sum(known) if len(known) == len(counts) else None
    return FeatureCache(data.cache, each, samples, None if samples is None else samples * each)


def _moments(folder: Path) -> int | None:
    try:
        count = json.loads((folder / INFO).read_bytes())["total_frames"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if isinstance(count, int) and count >= 0 else None
