"""One rank of tests/test_features.py: trains each of several specs, with features kept and without, and rank 0 says the
losses, as a JSON object."""

import json
import sys

from scaling.engine.process import process_from_environment
from scaling.profile.sinks import Memory
from scaling.run import resolve, run
from scaling.spec import parse_spec
from scaling.spec.document import document_of


def main() -> None:
    out, *specs = sys.argv[1:]
    found = []
    with process_from_environment() as process:
        for text in specs:
            memory = Memory()
            run(resolve(parse_spec(document_of("spec", text)), process.world_size), process, [memory])
            losses = [step.loss for step in memory.steps]
            found.append({"losses": losses, "validation": [record.loss for record in memory.validations]})
        if process.is_main:
            with open(out, "w", encoding="utf-8") as file:
                json.dump(found, file)


if __name__ == "__main__":
    main()
