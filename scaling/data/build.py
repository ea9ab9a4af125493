"""From a spec to its datasets."""

from collections.abc import Callable, Sequence

from scaling.data.actions import SyntheticActions
from scaling.data.chat import open_chat_data
from scaling.data.dataset import Dataset
from scaling.data.episodes import open_episode_data
from scaling.data.given import open_given_data
from scaling.data.preference import open_preference_data
from scaling.data.prompts import open_prompt_data
from scaling.data.synthetic import SyntheticDataset
from scaling.data.text import open_text_data
from scaling.data.tokens import open_token_data
from scaling.errors import UserError
from scaling.inventory import words
from scaling.spec.sections import (
    PPO,
    SFT,
    AnyVla,
    ChatData,
    EpisodeData,
    FactoryData,
    PreferenceData,
    Spec,
    SyntheticData,
    TextData,
    TokenData,
)

UNKNOWN = 2**31
"""Words, where it is not known how many a model knows: more than any tokenizer has."""


def build_datasets(spec: Spec, allow_import: Sequence[str] = ()) -> tuple[Dataset, Dataset | None]:
    """The training and the validation samples (None where none are held out), opened; text is tokenised if need be.

    Every rank calls this by itself, at the same time as others or not: ranks that find another one of their host
    tokenising wait for it. `allow_import` are the packages that a factory may come from. UserError for data that cannot
    be used, StorageError for the cache folder.
    """
    if isinstance(spec.data, FactoryData):
        return open_given_data(spec.data, allow_import, wants_validation=spec.validation is not None)
    model = spec.model
    if isinstance(model, AnyVla):
        data = spec.data
        if isinstance(data, EpisodeData):
            return open_episode_data(data, model)
        assert isinstance(data, SyntheticData), "the spec refuses others"
        length, masked = data.sequence_length, data.masked_fraction
        return _streams(data, lambda number, count: SyntheticActions(spec.seed, number, count, model, length, masked))
    vocab_size = words(model)
    if vocab_size is None:  # of a module that nobody has looked into
        if isinstance(spec.data, SyntheticData):
            raise UserError(
                '`model.inventory` must be a file for the data "synthetic", which are made of the words that the model '
                "knows, but is null; name one, and run `python -m scaling.inventory SPEC`"
            )
        vocab_size = UNKNOWN
    match spec.data:
        case TextData() as data:
            return open_text_data(data, vocab_size)
        case TokenData() as data:
            return open_token_data(data, vocab_size)
        case ChatData() as data if isinstance(spec.objective, PPO):
            return open_prompt_data(data, vocab_size, spec.objective.max_new_tokens)
        case ChatData() as data:
            return open_chat_data(data, vocab_size, spoken_only=isinstance(spec.objective, SFT))
        case PreferenceData() as data:
            return open_preference_data(data, vocab_size)
        case EpisodeData():
            raise AssertionError("the spec refuses others than a vla")
        case SyntheticData() as data:
            length, masked = data.sequence_length, data.masked_fraction
            return _streams(
                data, lambda number, count: SyntheticDataset(spec.seed, number, count, length, vocab_size, masked)
            )


def _streams(data: SyntheticData, stream: Callable[[int, int], Dataset]) -> tuple[Dataset, Dataset | None]:
    return stream(0, data.samples), stream(1, data.validation_samples) if data.validation_samples else None
