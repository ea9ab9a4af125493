"""What a run writes holds no secret of whoever started it: tokens of the environment, passwords in addresses."""

import os
import re
from typing import Any

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|(?:API|ACCESS|PRIVATE|AUTH)_KEY)(?:_|$)",
    re.IGNORECASE,
)
"""Environment variables such as HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY."""
_PLACE_NAME = re.compile(r"_(?:FILE|PATH|DIR|URI)$", re.IGNORECASE)
"""Those that name where a secret is, as AWS_WEB_IDENTITY_TOKEN_FILE, hold none themselves."""
_SHORTEST = 8
"""A shorter value is a switch ("1", "true"), and would be found in the middle of words."""
_USER_INFO = re.compile(r"://([^\s/?#\"'<>]*)@")
_AUTHORIZATION = re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?)(?:\w+\s+)?[^\s\"']+", re.IGNORECASE)
_HIDDEN = "***"


def without_user_info(text: str) -> str:
    """`text` with `***` for the user names and passwords of the URLs in it."""
    return _USER_INFO.sub(f"://{_HIDDEN}@", text)


def redacted(text: str) -> str:
    """`text` with `***` for the environment's secrets, the user-info of URLs and the value of Authorization headers."""
    return _without(text, _secrets())


def redacted_json(value: Any) -> Any:
    """As `redacted`, for each text in `value`, keys included: escaped in JSON a secret would not be found."""
    secrets = _secrets()  # once: a walk through the whole environment

    def told(value: Any) -> Any:
        if isinstance(value, str):
            return _without(value, secrets)
        if isinstance(value, dict):
            return {told(key): told(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        if isinstance(value, list | tuple):
            return [told(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return value

    return told(value)


def _without(text: str, secrets: list[str]) -> str:
    text = _AUTHORIZATION.sub(rf"\1{_HIDDEN}", without_user_info(text))
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets() -> list[str]:
    """The longest first: one may be part of another."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _PLACE_NAME.search(name):
            found.add(value.strip())
        found.update(info.rpartition(":")[2] for info in _USER_INFO.findall(value))
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)
