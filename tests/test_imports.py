"""What the modules may not do, read from their source: wake torch early, act at import, ask which backend it is.

Who imports whom is held by import-linter (pyproject.toml); here is what it cannot see.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "scaling"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

HEAVY = ("torch", "numpy", "deepspeed", "rich", "tokenizers", "transformers", "pynvml")
ENTRY_POINTS = (
    *("scaling.train", "scaling.export", "scaling.parity", "scaling.plan"),
    *("scaling.spec.__main__", "scaling.inventory.__main__", "scaling.render.__main__", "scaling.calibrate.__main__"),
    "scaling.report.__main__",
)
"""They load torch, if at all, only once the command line and the spec have been found right."""

BACKENDS = {"DeepSpeed", "FSDP", "DDP", "Single"}
DISPATCH = {
    *("render/__init__.py", "engine/build.py", "estimate/step.py", "estimate/strategies.py", "estimate/formulas.py")
}
"""One `match` on the backend per direction: spec -> dict, spec -> engine, spec -> what the engine holds, and costs; and
the words for what it holds."""
LEGALITY = {"batch.py", "spec/sections/spec.py"}
"""May ask for a backend's own rule about the number of ranks; it chooses nothing."""


def parsed(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


def light_modules() -> list[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (below,) = (contract for contract in contracts if contract["name"] == "No torch, numpy or deepspeed below floor 4")
    return below["source_modules"]


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs when the module is imported: everything but function bodies and what only the main program does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and re.fullmatch(r"TYPE_CHECKING|__name__ == '__main__'", ast.unparse(child.test)):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in (*child.decorator_list, child.args):
                yield part
                yield from at_import(part)
        elif isinstance(child, ast.Lambda):
            yield from at_import(child.args)
        else:
            yield child
            yield from at_import(child)


def effects(tree: ast.Module) -> list[str]:
    """What a module does to the world, or asks of it, at import."""
    asks = r"os\.(environ|getenv|cpu_count)|torch\.(cuda|distributed)\..*\(|(dist|subprocess|socket|time)\.\w+\("
    acts = r"(print|open|logging\.\w*[cC]onfig|torch\.set_\w+)\("
    found: list[str] = []
    for node in at_import(tree):
        text = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or re.match(f"{asks}|{acts}", text):
            found.append(ast.unparse(node))
    return found


def questions(tree: ast.Module) -> list[str]:
    """Where code branches on which backend it has."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Match):
            classes = {ast.unparse(pattern.cls) for pattern in ast.walk(node) if isinstance(pattern, ast.MatchClass)}
            branches = bool(classes & BACKENDS) or "backend" in ast.unparse(node.subject)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            branches = any(isinstance(name, ast.Name) and name.id in BACKENDS for name in ast.walk(node.args[1]))
        else:
            branches = isinstance(node, ast.Compare) and "backend.kind" in ast.unparse(node)
        if branches:
            found.append(ast.unparse(node).partition("\n")[0])
    return found


def test_the_package_is_empty() -> None:
    assert (PACKAGE / "__init__.py").read_text() == ""


@pytest.mark.parametrize("module", [*light_modules(), *ENTRY_POINTS])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_the_loop_does_not_know_its_backend() -> None:
    source = (PACKAGE / "loop.py").read_text(encoding="utf-8")
    assert re.findall("deepspeed|fsdp|ddp|zero|isinstance|backend", source, re.IGNORECASE) == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_happens_at_import(module: str) -> None:
    assert effects(parsed(module)) == []


def test_the_backend_is_asked_for_in_few_places() -> None:
    asking = {module: found for module in MODULES if (found := questions(parsed(module)))}
    assert set(asking) - LEGALITY == DISPATCH, asking


@pytest.mark.parametrize(
    "source",
    [
        "import os\nA = os.environ.get('A')",
        "import os\ndef f(a=os.environ): ...",
        "import os\nclass C:\n    a = [os.getenv('A')]",
        "import logging\nlogging.basicConfig()",
        "import torch\nif torch.cuda.is_available():\n    A = 1",
        "print('banner')",
    ],
)
def test_effects_are_found(source: str) -> None:
    assert effects(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "import os\ndef f():\n    return os.environ['A']",
        "import os\nif __name__ == '__main__':\n    print(os.environ)",
        "import logging, re\nlog = logging.getLogger('a')\nP = re.compile('a')",
    ],
)
def test_what_is_no_effect(source: str) -> None:
    assert effects(ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "match spec.backend:\n    case _: ...",
        "match x:\n    case FSDP(): ...",
        "isinstance(spec.backend, DDP | FSDP)",
        "spec.backend.kind == 'fsdp'",
    ],
)
def test_questions_are_found(source: str) -> None:
    assert questions(ast.parse(source))
