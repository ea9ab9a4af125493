"""Real instructions that every machine has: a function of Python's standard library, and what it says it does."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

from scaling.data.lines import Line

_MOST_LINES = 10
"""Of a function's code; longer ones lose their end."""
QUESTION = "What does this Python code do?"


def docstring_lines(path: Path) -> Iterator[Line]:
    """A line for each function and class of a .py file that has a docstring: its code without it, and the first
    paragraph of it. Nothing of a file that is no Python of this version (the standard library's tests hold some)."""
    try:
        text = path.read_bytes().decode("utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        said = ast.get_docstring(node)
        if not said or not said.strip():
            continue
        first, *rest = node.body
        assert first.end_lineno is not None
        end = min(node.end_lineno or first.end_lineno, first.end_lineno + _MOST_LINES)
        code = lines[node.lineno - 1 : first.lineno - 1] + (lines[first.end_lineno : end] if rest else [])
        answer = " ".join(said.strip().split("\n\n")[0].split())
        asked = textwrap.dedent("\n".join(code[:_MOST_LINES]).rstrip())
        if asked.strip():
            record = {"instruction": QUESTION, "context": asked, "response": answer}
            yield Line(path, node.lineno, len(asked) + len(answer), record)
