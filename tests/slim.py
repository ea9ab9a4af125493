"""The commands that need no torch, tried where there is none: a new environment with the core dependencies alone.

    python tests/slim.py

Installs this checkout without extras into a temporary environment, and there, from outside the checkout, runs what
must work on a laptop: checking a spec, printing the schema, rendering, listing parameters, planning, reporting on a
run. Ends with exit code 1 at the first failure.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from made_runs import make_run

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "scaling")
ABSENT = ("torch", "numpy", "deepspeed", "tokenizers", "transformers")
SUFFIXES = (".json", ".html", ".css", ".js")
"""Of the data files in the package."""
COMMANDS = (
    "scaling.spec schema",
    "scaling.spec validate gpt2-124m",
    "scaling.render gpt2-124m --world-size 8",
    "scaling.inventory gpt2-124m",
    "scaling.plan --spec gpt2-124m --gpus 8xH100-80GB --as-written",
    "scaling.plan --spec llama-8b --gpus 8xH100-80GB",
    "scaling.report made",
    "scaling.doctor made",
)
"""What must run; how fast is for benchmarks/plan_speed.py to say."""


def main() -> int:
    """Install, look, run; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="scaling-slim-") as name:
        folder = Path(name)
        python = install(folder)
        check_installed(python, folder)
        make_run(folder / "made")
        for command in COMMANDS:
            output = run([str(python), "-m", *command.split()], folder)
            require(bool(output.strip()), f"`{command}` must print something, but printed nothing")
            print(f"runs: {command}", flush=True)
    return 0


def install(folder: Path) -> Path:
    """An environment in `folder` with the package and its core dependencies; returns its Python."""
    source = folder / "source"  # a copy: the build leaves nothing in the checkout, and finds nothing of earlier ones
    source.mkdir()
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run([str(python), "-m", "pip", "install", "--quiet", str(source)], folder)
    shutil.rmtree(source)
    return python


def check_installed(python: Path, folder: Path) -> None:
    """No heavy package came along, the package data did, and what is imported is what was installed."""
    code = (
        "import importlib.util as u, importlib.metadata as m, pathlib, scaling;"
        f"print(*[name for name in {ABSENT} if u.find_spec(name)], sep=',');"
        "print(pathlib.Path(scaling.__file__).parent);"
        "print(*sorted({d.name for d in m.distributions()} - {'pip', 'setuptools', 'scaling'}), sep=', ')"
    )
    heavy, where, packages = run([str(python), "-c", code], folder).splitlines()
    print(f"installed: {packages}", flush=True)
    require(not heavy, f"the core dependencies must do without {heavy}, but bring it")
    package = Path(where)
    require(package.is_relative_to(folder), f"the installed package must be imported, but {package} was")
    files = sorted(path for path in (CHECKOUT / "scaling").rglob("*") if path.suffix in SUFFIXES)
    data = [path.relative_to(CHECKOUT) for path in files]
    missing = [str(path) for path in data if not (package.parent / path).is_file()]
    require(bool(data) and not missing, f"the wheel must hold all of {len(data)} data files, but lacks {missing}")


def run(command: list[str], folder: Path) -> str:
    """What the command prints; where it fails, all it printed, and the end."""
    # A PYTHONPATH could lead back to the checkout.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    require(done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def require(condition: bool, message: str) -> None:
    """End the check with `message` unless `condition`."""
    if not condition:
        sys.exit(f"slim check: {message}")


if __name__ == "__main__":
    sys.exit(main())
