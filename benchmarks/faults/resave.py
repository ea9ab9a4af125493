"""Restore checkpoints under some backend and save each again at once; started by `moves` under a launcher."""

import json
import sys
from argparse import ArgumentParser
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scaling.checkpoint.keeper import Checkpoints, restore
from scaling.checkpoint.store import Store
from scaling.engine.build import build_engine
from scaling.engine.process import process_from_environment
from scaling.models.build import model_recipe
from scaling.run import _identity, resolve
from scaling.spec import load_spec


def main() -> None:
    parser = ArgumentParser()
    for name in ("--spec", "--run-dir", "--checkpoints"):
        parser.add_argument(name, required=True)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    spec = load_spec(options.spec, options.set)
    with process_from_environment() as process:
        job = resolve(spec, process.world_size)
        recipe = model_recipe(spec)
        with closing(build_engine(spec, job.rendered, recipe, job.groups, process)) as engine:
            for name, path in json.loads(Path(options.checkpoints).read_text()).items():
                progress = restore(engine, Path(path))
                assert spec.checkpoint is not None
                store = Store(Path(options.run_dir) / name)
                keeper = Checkpoints(store, spec.checkpoint, process, _identity(job, process, "the same"))
                with closing(keeper):
                    keeper.save(engine, progress)
                    keeper.finish()


if __name__ == "__main__":
    main()
