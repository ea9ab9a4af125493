"""launch/train.py with the faults of `hooks` in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.faults.hooks import install
from scaling.errors import run_program
from scaling.train import main

if __name__ in ("__main__", "__mp_main__"):  # the latter in processes that it starts
    install()
if __name__ == "__main__":
    run_program(main)
