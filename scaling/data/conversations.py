"""Conversations: what the lines of a jsonl file say, and the text that a template makes of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scaling.data.lines import Malformed, kind_of, text_of

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
"""OpenAI's and MiniMind's names, and ShareGPT's."""


@dataclass(frozen=True)
class Message:
    """What one side says at a time."""

    role: Role
    content: str


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation's text that is tokenised by itself."""

    text: str
    spoken: bool
    """The assistant's own words, or what ends them: targets of sft."""
    ends: bool = False
    """The end-of-text token follows."""


def messages_of(record: Any) -> list[Message]:
    """The conversation that a line's object holds, in any of the forms that `ChatData` names. Raises Malformed."""
    if isinstance(record, Malformed):
        raise record
    if not isinstance(record, dict):
        raise Malformed(f"the line must be a JSON object, but is {kind_of(record)}")
    for field in ("messages", "conversations"):
        if field in record:
            return checked(_listed(record[field], field), field)
    if "instruction" in record:
        asked = text_of(record, "instruction")
        more = next((record[name] for name in ("context", "input") if record.get(name)), "")
        if not isinstance(more, str):
            raise Malformed(f"`context` must be text, but is {kind_of(more)}")
        answer = "response" if "response" in record else "output"
        asked = f"{asked}\n\n{more}" if more.strip() else asked
        return [Message("user", asked), Message("assistant", text_of(record, answer))]
    named = ", ".join(f"`{name}`" for name in list(record)[:8])
    raise Malformed(
        "the line must have `messages`, `conversations`, or `instruction` and `response`, but has "
        + (named or "no field")
    )


def listed_messages(value: Any, field: str) -> list[Message]:
    """Messages as `messages` and `conversations` have them; those of the user alone where it is a text."""
    return [Message("user", value)] if isinstance(value, str) and value.strip() else _listed(value, field)


def checked(messages: list[Message], field: str) -> list[Message]:
    """The same, if the assistant says something in it."""
    if not any(message.role == "assistant" for message in messages):
        raise Malformed(f"`{field}` must have a message of the assistant, but has none")
    return messages


@dataclass(frozen=True)
class Said:
    """A conversation, and which of it is to be learnt."""

    messages: Sequence[Message]
    since: int = 0
    """What the assistant says from this message on."""


def pieces(said: Said, template: str) -> list[Piece]:
    """The text of a conversation. Neighbours of one kind are joined, as a tokenizer would see them in one text."""
    parts = _chatml(said) if template == "chatml" else _instruction(said)
    joined: list[Piece] = []
    for part in parts:
        if joined and joined[-1].spoken == part.spoken and not joined[-1].ends:
            part = Piece(joined.pop().text + part.text, part.spoken, part.ends)
        joined.append(part)
    return joined


def _chatml(said: Said) -> Iterator[Piece]:
    """As Qwen's and MiniMind's tokenizers have it."""
    for index, message in enumerate(said.messages):
        yield Piece(f"{chr(10) if index else ''}<|im_start|>{message.role}\n", False)
        yield Piece(f"{message.content}<|im_end|>", message.role == "assistant" and index >= said.since)


def _instruction(said: Said) -> Iterator[Piece]:
    for index, message in enumerate(said.messages):
        between = "\n\n" if index else ""
        heading = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}[message.role]
        yield Piece(between + heading, False)
        speaks = message.role == "assistant"
        yield Piece(message.content, speaks and index >= said.since, ends=speaks)


def _listed(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Malformed(f"`{field}` must be a list of messages, but is {kind_of(value)}")
    found: list[Message] = []
    for index, item in enumerate(value):
        place = f"{field}.{index}"
        if not isinstance(item, dict):
            raise Malformed(f"`{place}` must be an object, but is {kind_of(item)}")
        role = item.get("role", item.get("from"))
        if role not in _ROLES:
            raise Malformed(f"`{place}.role` must be one of {', '.join(_ROLES)}, but is {_shown(role)}")
        content = "content" if "content" in item else "value"
        found.append(Message(_ROLES[role], text_of(item, content, f"{place}.{content}")))
    return found


def _shown(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, str) else kind_of(value) if value is not None else "absent"
