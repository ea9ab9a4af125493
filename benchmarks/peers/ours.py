"""This toolkit: launch/train.py with a spec, and a mark where each step ends. The user writes the spec alone."""

import json
import sys
from typing import Any

import scaling.loop
from benchmarks.peers.common import HUGGINGFACE, SPEC, Timeline, job_of_command_line
from scaling.train import main

if __name__ == "__main__":
    job = job_of_command_line()
    timeline, take = Timeline(job), scaling.loop.train_step

    def marked(*arguments: Any) -> Any:
        result = take(*arguments)
        timeline.mark(result.loss)
        return result

    scaling.loop.train_step = marked
    changes = ["--set", f"max_steps={job.steps}"]
    if job.variant == "transformers":
        model = {"kind": "huggingface", "path": str(job.folder / HUGGINGFACE), "inventory": None}
        changes += ["--set", f"model={json.dumps(model)}"]
    sys.exit(main(["--spec", str(job.folder / SPEC), "--run-dir", str(job.out / "run"), "--plain", *changes]))
