"""Code of the user's own: imported only where the command line allows its package. A spec cannot allow it."""

import argparse
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from scaling.errors import UserError

logger = logging.getLogger("scaling")


def allowed_package(text: str) -> str:
    """`type=allowed_package` of --allow-import: a package's name, or a dotted prefix of modules."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", text) or len(text) > 200:
        raise argparse.ArgumentTypeError(f"must be a package such as my_code or my_code.losses, but is {text[:60]!r}")
    return text


GIVEN = "scaling_given"
"""Package of what a program hands over itself: nothing is imported for it."""


def give(**objects: Any) -> None:
    """Let specs name these objects, as "scaling_given:NAME", in this process."""
    module = ModuleType(GIVEN)
    module.__dict__.update(objects)
    sys.modules[GIVEN] = module


def add_allow_import(parser: argparse.ArgumentParser) -> None:
    """The option --allow-import, as `allow_import`."""
    parser.add_argument(
        "--allow-import",
        action="append",
        default=[],
        type=allowed_package,
        metavar="PACKAGE",
        help="let the spec import from this package, whose code then runs; repeatable",
    )


def check_allowed(target: str, allowed: Sequence[str], field: str = "target") -> None:
    """UserError unless `target` ("package.module:function") is in one of the packages `allowed`; imports nothing.

    `field` is what messages call the target.
    """
    module = target.partition(":")[0]
    if any(module == package or module.startswith(f"{package}.") for package in allowed):
        return
    package = module.partition(".")[0]
    given = f"only {', '.join(allowed)} is" if allowed else "no package is"
    raise UserError(
        f"`{field}` must be in a package that --allow-import names, but is {target[:100]}, and {given} allowed; "
        f"if you trust its code, pass --allow-import {package[:60]}"
    )


def import_target(target: str, allowed: Sequence[str], field: str = "target") -> Callable[..., Any]:
    """The function that `target` ("package.module:function") names, which is imported, and told to the log, first.

    Importing a module runs it and the packages that it is in. The working folder counts as with `python -m`. UserError
    where `allowed` does not cover the module, before anything is imported, and where there is no such function; what
    the module itself raises passes through.
    """
    check_allowed(target, allowed, field)
    name, _, attribute = target.partition(":")
    if name != GIVEN:
        logger.info(f"importing {name} for {target}, which --allow-import permits")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise UserError(
            f"`{field}` must be in a module that can be imported, but {name} cannot: there is no {error.name} in "
            f"{os.getcwd()} or among the installed packages; correct it, or start from the folder that holds it"
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "there is none" if function is None else f"it is a {type(function).__name__}"
        raise UserError(f"`{field}` must be a function, but {attribute} of {name} is not: {what}; correct it")
    return function


def call_target(target: str, arguments: Mapping[str, Any], allowed: Sequence[str], section: str) -> Any:
    """What the function that `target` names returns for `arguments`; UserError where it does not take them.

    `section` is that of the spec which has the two: "objective".
    """
    function = import_target(target, allowed, f"{section}.target")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"`{section}.arguments` must be those of {target}, but are not: {error}; correct them"
        ) from None
    except ValueError:
        pass  # some functions that are not written in Python do not say what they take
    return function(**arguments)
