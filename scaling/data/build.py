"""From a spec to its datasets."""

from scaling.data.dataset import Dataset
from scaling.data.synthetic import SyntheticDataset
from scaling.data.text import open_text_data
from scaling.data.tokens import open_token_data
from scaling.spec.sections import Spec, SyntheticData, TextData, TokenData


def build_datasets(spec: Spec) -> tuple[Dataset, Dataset | None]:
    """The training and the validation samples (None where none are held out), opened; text is tokenised if need be.

    Every rank calls this by itself, at the same time as others or not: ranks that find another one of their host
    tokenising wait for it. UserError for data that cannot be used, StorageError for the cache folder.
    """
    vocab_size = spec.model.vocab_size
    match spec.data:
        case TextData() as data:
            return open_text_data(data, vocab_size)
        case TokenData() as data:
            return open_token_data(data, vocab_size)
        case SyntheticData() as data:
            return _synthetic(data, spec.seed, vocab_size)


def _synthetic(data: SyntheticData, seed: int, vocab_size: int) -> tuple[Dataset, Dataset | None]:
    def stream(number: int, samples: int) -> SyntheticDataset:
        return SyntheticDataset(seed, number, samples, data.sequence_length, vocab_size, data.masked_fraction)

    return stream(0, data.samples), stream(1, data.validation_samples) if data.validation_samples else None
