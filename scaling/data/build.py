"""From a spec to its datasets."""

from collections.abc import Callable

from scaling.data.actions import SyntheticActions
from scaling.data.chat import open_chat_data
from scaling.data.dataset import Dataset
from scaling.data.preference import open_preference_data
from scaling.data.synthetic import SyntheticDataset
from scaling.data.text import open_text_data
from scaling.data.tokens import open_token_data
from scaling.inventory import inventory_of
from scaling.spec.sections import SFT, ChatData, Decoder, PreferenceData, Spec, SyntheticData, TextData, TokenData, Vla


def build_datasets(spec: Spec) -> tuple[Dataset, Dataset | None]:
    """The training and the validation samples (None where none are held out), opened; text is tokenised if need be.

    Every rank calls this by itself, at the same time as others or not: ranks that find another one of their host
    tokenising wait for it. UserError for data that cannot be used, StorageError for the cache folder.
    """
    model = spec.model
    if isinstance(model, Vla):
        data = spec.data
        assert isinstance(data, SyntheticData), "the spec refuses others"
        length, masked = data.sequence_length, data.masked_fraction
        return _streams(data, lambda number, count: SyntheticActions(spec.seed, number, count, model, length, masked))
    vocab_size = model.vocab_size if isinstance(model, Decoder) else inventory_of(model).vocab_size
    match spec.data:
        case TextData() as data:
            return open_text_data(data, vocab_size)
        case TokenData() as data:
            return open_token_data(data, vocab_size)
        case ChatData() as data:
            return open_chat_data(data, vocab_size, spoken_only=isinstance(spec.objective, SFT))
        case PreferenceData() as data:
            return open_preference_data(data, vocab_size)
        case SyntheticData() as data:
            length, masked = data.sequence_length, data.masked_fraction
            return _streams(
                data, lambda number, count: SyntheticDataset(spec.seed, number, count, length, vocab_size, masked)
            )


def _streams(data: SyntheticData, stream: Callable[[int, int], Dataset]) -> tuple[Dataset, Dataset | None]:
    return stream(0, data.samples), stream(1, data.validation_samples) if data.validation_samples else None
