"""From text to token ids: bytes as they are, or a tokenizer.json of Hugging Face's."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.errors import UserError

ENDS_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""What GPT-2 and Qwen, Llama 2 and T5, Llama 3, and Gemma call the token between two documents."""


@dataclass(frozen=True)
class Tokenizer:
    """A way to turn documents into ids."""

    identity: str
    """Two tokenizers of one identity give equal ids."""
    vocabulary: int
    """One more than the largest id."""
    pieces: Callable[[Sequence[str]], list[np.ndarray]]
    """Ids of each text, each an array of integers."""
    text: Callable[[np.ndarray], str]
    """The text of ids, as far as it is any."""
    end: int | None
    """The token between two documents; None where it has none."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each document, each ending with the end-of-text token where there is one."""
        ending = [] if self.end is None else [self.end]
        return [np.append(ids, ids.dtype.type(ending)) for ids in self.pieces(texts)]


def open_tokenizer(name: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of this name ("bytes", or the path of a tokenizer.json or of its folder), checked against the
    model's vocab_size."""
    tokenizer = Tokenizer("bytes", 256, _bytes_of, _text_of_bytes, 0) if name == "bytes" else _open_file(Path(name))
    if tokenizer.vocabulary > vocab_size:
        raise UserError(
            f"`model.vocab_size` must be at least {tokenizer.vocabulary} for the tokenizer {name}, "
            f"but is {vocab_size}; set it to {tokenizer.vocabulary}, or to the next multiple of 128 for speed"
        )
    return tokenizer


def _bytes_of(texts: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]


def _text_of_bytes(ids: np.ndarray) -> str:
    return bytes(ids[ids < 256].astype(np.uint8)).decode("utf-8", errors="replace")


def _open_file(path: Path) -> Tokenizer:
    import tokenizers  # here, because most runs on bytes and on token files do without it

    if path.is_dir():
        path = path / "tokenizer.json"
    if path.exists() and not path.is_file():
        raise UserError(
            f'`data.tokenizer` must be "bytes" or the path of a tokenizer.json, but {path} is no regular file; '
            "correct the path"
        )
    try:
        content = path.read_bytes()
        inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except OSError as error:
        raise UserError(
            f'`data.tokenizer` must be "bytes" or the path of a tokenizer.json, but {path} cannot be read: '
            f"{error.strerror or error}; correct the path"
        ) from error
    except Exception as error:  # the library raises plain Exception for what it cannot parse
        raise UserError(
            f"`data.tokenizer` must be a Hugging Face tokenizer.json, but {path} is not: {error}; save it again"
        ) from error
    # Some files carry the settings of a fine-tuning run, which would cut or pad every document.
    inner.no_truncation()
    inner.no_padding()
    end = next((inner.token_to_id(token) for token in ENDS_OF_TEXT if inner.token_to_id(token) is not None), None)

    def pieces(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def text(ids: np.ndarray) -> str:
        return inner.decode(ids.tolist(), skip_special_tokens=True)

    vocabulary = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
    return Tokenizer(hashlib.sha256(content).hexdigest(), vocabulary, pieces, text, end)
