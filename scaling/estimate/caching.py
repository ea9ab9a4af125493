"""Results of pure functions that are asked for again and again."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def cached(function: F) -> F:
    """`functools.lru_cache` with the function's own type.

    That of lru_cache asks for arguments whose class has a hash; sections of a spec have one, but only at run time.
    """
    return cast(F, lru_cache(maxsize=4096)(function))
