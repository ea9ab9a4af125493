"""Train what a spec says: `deepspeed launch/train.py --spec SPEC`, under torchrun, or with plain python."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from scaling.errors import run_program
from scaling.train import main

if __name__ == "__main__":
    run_program(main)
