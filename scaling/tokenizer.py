"""Train a tokenizer of one's own: byte-level BPE, as GPT-2's and MiniMind's, written as a tokenizer.json.

    python -m scaling.tokenizer 'data/*.jsonl' --vocab-size 6400 --out tokenizer.json

Of a .jsonl file the `text` of each line is read, or its conversation; "python-stdlib" means the standard library's
source. Any text can be spelt in it, whatever it was trained on, since the 256 bytes are its alphabet.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling.errors import CommandLine, UserError, positive, run_program, write_output

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""What ends a text, and what the template "chatml" puts around what is said."""
_BYTES = 256


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    smallest = _BYTES + len(SPECIAL)
    if options.vocab_size < smallest:
        raise UserError(
            f"`--vocab-size` must be at least {smallest} (256 bytes and {len(SPECIAL)} special tokens), but is "
            f"{options.vocab_size}; use a larger one"
        )
    from scaling.data.files import matching_files

    paths = matching_files(options.files, "FILES", with_stdlib=True)
    trained = train(_texts(paths), options.vocab_size)
    write_output(Path(options.out), trained, "--out")
    size = len(json.loads(trained)["model"]["vocab"])
    if size < options.vocab_size:
        print(f"note: the text has no more than {size:,} tokens to give: that is `model.vocab_size`", file=sys.stderr)
    print(f"{options.out}: {size:,} tokens, of {len(paths):,} files")


def train(texts: Iterator[str], vocab_size: int) -> str:
    """A tokenizer.json of `vocab_size` tokens (fewer where the texts give no more), trained on these."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True) + "\n"


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    from scaling.data.conversations import messages_of
    from scaling.data.files import digest_of, unreadable
    from scaling.data.lines import Malformed, read_lines, text_of

    for path in paths:
        if path.suffix != ".jsonl":
            try:
                yield path.read_bytes().decode("utf-8", errors="replace")
            except OSError as error:
                raise unreadable(path, error) from error
            continue
        for line in read_lines(path, digest_of(path)[0]):
            try:
                if isinstance(line.value, dict) and "text" in line.value:
                    yield text_of(line.value, "text")
                else:
                    yield from (message.content for message in messages_of(line.value))
            except Malformed as error:
                raise UserError(f"{path}:{line.number}: {error}; correct the line, or leave it out") from error


def _parser() -> CommandLine:
    line = CommandLine(prog="python -m scaling.tokenizer", description=(__doc__ or "").partition("\n")[0])
    line.add_argument("files", nargs="+", metavar="FILES", help='globs of text or .jsonl files, or "python-stdlib"')
    line.add_argument("--vocab-size", type=positive, required=True, help="tokens, special ones among them")
    line.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")
    return line


if __name__ == "__main__":
    run_program(main)
