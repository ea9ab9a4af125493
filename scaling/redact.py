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
    text = _AUTHORIZATION.sub(rf"\1{_HIDDEN}", without_user_info(text))
    for secret in _secrets():
        text = text.replace(secret, _HIDDEN)
    return text


def redacted_json(value: Any) -> Any:
    """As `redacted`, for each text in `value`, keys included: escaped in JSON a secret would not be found."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted_json(key): redacted_json(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [redacted_json(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _secrets() -> list[str]:
    """The longest first: one may be part of another."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _PLACE_NAME.search(name):
            found.add(value.strip())
        found.update(info.rpartition(":")[2] for info in _USER_INFO.findall(value))
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)
