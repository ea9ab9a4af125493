"""The chat template in a tokenizer's folder: the text that it makes of a conversation, and what of it is to be learnt.

Where the template marks the assistant's words ({% generation %}) they are taken as marked, otherwise found by comparing
prefixes: what follows the generation prompt, up to the text of the conversation so far.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scaling.data.conversations import Said
from scaling.data.files import unreadable
from scaling.data.lines import Malformed
from scaling.errors import UserError

FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", "special_tokens_map.json")
"""What beside tokenizer.json decides the text of a conversation; transformers' names."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""As transformers looks for it (utils/chat_template_utils.py)."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation."""

    text: str
    spoken: tuple[tuple[int, int], ...]
    """From which character to which the assistant says what is to be learnt, what ends it included."""


class FolderTemplate:
    """The template of a tokenizer's folder."""

    def __init__(self, name: str) -> None:
        """`name`: the folder, or the tokenizer.json in it. transformers is not imported before it is needed."""
        path = Path(name)
        self.folder = path if path.is_dir() else path.parent

    @cached_property
    def identity(self) -> str:
        """Two templates of one identity, with one tokenizer, make the same of a conversation."""
        digest = hashlib.sha256()
        for path in (self.folder / file for file in FILES):
            try:
                digest.update(f"{path.name} {len(content := path.read_bytes())}\n".encode() + content)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise unreadable(path, error) from error
        return digest.hexdigest()

    @property
    def end(self) -> int:
        """Id of the token with which the assistant ends. UserError where none is named."""
        found = self._tokenizer.eos_token_id
        if not isinstance(found, int):
            raise UserError(
                f"`data.tokenizer` must name a token that ends a response (eos_token in tokenizer_config.json), but "
                f"that in {self.folder} names none; name it"
            )
        return found

    def rendered(self, said: Said) -> Rendered:
        """The text. Raises Malformed for a conversation that the template does not take, and UserError where the
        template does not tell whose words are whose."""
        from jinja2 import TemplateError

        messages = [{"role": message.role, "content": message.content} for message in said.messages]
        speaks = [index for index, message in enumerate(said.messages) if message.role == "assistant"]
        try:
            text, spans = self._marked(messages) if self._marks else self._compared(messages, speaks)
        except ImportError as error:  # transformers wants a certain version of jinja2
            raise UserError(
                f'`data.template` must be "chatml" or "instruction" here, but is "tokenizer": {error}'
            ) from error
        except TemplateError as error:
            raise Malformed(f"the line must be a conversation as the chat template wants it, but: {error}") from error
        if len(spans) != len(speaks):
            raise self._refusal(f"marks {len(spans)} stretches as the assistant's in a conversation with {len(speaks)}")
        wanted = [span for index, span in zip(speaks, spans, strict=True) if index >= said.since]
        return Rendered(text, tuple(wanted))

    def tokens(self, some: Sequence[Rendered]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids of each text, uint32, and which of them the assistant says: those with a character of its words."""
        settings: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        found = self._tokenizer([one.text for one in some], **settings)
        for one, ids, offsets in zip(some, found["input_ids"], found["offset_mapping"], strict=True):
            first, last = np.array(offsets, np.int64).reshape(-1, 2).T
            spoken = np.zeros(len(ids), bool)
            for start, end in one.spoken:
                spoken |= (first < end) & (last > start)
            yield np.array(ids, np.uint32), spoken

    # ------------------------------------------------------------ texts

    def _marked(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in spans]

    def _compared(self, messages: list[dict[str, str]], speaks: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        whole, spans = self._render(messages)[0], list[tuple[int, int]]()
        for index in speaks:
            before = self._render(messages[:index], add_generation_prompt=True)[0]
            after = self._render(messages[: index + 1])[0]
            if not whole.startswith(before):
                raise self._refusal("begins a response otherwise than its generation prompt does")
            if not whole.startswith(after):
                raise self._refusal("writes what was said otherwise once more is said")
            # A line break after what ends the response is the template's.
            spans.append((len(before), max(len(before), len(after.rstrip()))))
        return whole, spans

    def _render(self, messages: list[dict[str, str]], **settings: bool) -> tuple[str, Any]:
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # what `apply_chat_template` calls
        known: dict[str, Any] = {**self._tokenizer.special_tokens_map, **settings}
        texts, spans = render(conversations=[messages], chat_template=self._template, **known)
        return texts[0], spans[0] if spans else None

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(
                f'`data.template` must be "chatml" or "instruction" where transformers is not installed ({error}), but '
                "is \"tokenizer\"; `pip install 'scaling[huggingface]'`"
            ) from None
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # what the libraries raise for files that are none is of many kinds
            raise UserError(
                "`data.tokenizer` must be in a folder that transformers opens a tokenizer of, for the template "
                f'"tokenizer", but {self.folder} is none: {(str(error).splitlines() or [""])[0][:300]}; correct it'
            ) from None

    @cached_property
    def _template(self) -> str:
        try:
            found = self._tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                '`data.template` must be "chatml" or "instruction" for a tokenizer without a chat template, but is '
                f'"tokenizer", and {self.folder} has none; set it, or put a chat_template.jinja there'
            ) from None
        assert isinstance(found, str)
        return found

    @property
    def _marks(self) -> bool:
        return _MARK.search(self._template) is not None

    def _refusal(self, reason: str) -> UserError:
        return UserError(
            "`data.template` must be one that tells whose words are whose, but the chat template in "
            f"{self.folder} {reason}; put the assistant's words between {{% generation %}} and {{% endgeneration %}} "
            'in it, or use "chatml"'
        )
