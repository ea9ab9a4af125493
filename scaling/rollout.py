"""Let a trained policy act: the simulated arm touches the disc that it is told, and how often it succeeds is counted.

    python -m scaling.rollout RUN_DIR_OR_CHECKPOINT [--which latest|best|STEP] [--trials 100] [--seed 1]
                              [--execute 4] [--untrained] [--json FILE] [--gif FILE]

One process, on the CPU. A trial begins at a table that no demonstration has shown, and succeeds once the tip is on the
disc. The policy plans a chunk of actions, the first `--execute` of them are carried out, and it plans again.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.errors import CheckpointError, CommandLine, UserError, positive, run_program, write_output
from scaling.imports import add_allow_import
from scaling.inventory import instruction_words, parameters
from scaling.spec import Spec, parse_spec
from scaling.spec.document import document_of
from scaling.spec.sections import AnyVla, EpisodeData

if TYPE_CHECKING:  # torch takes seconds to import: a wrong command line is refused before
    import numpy as np
    from torch import nn

    from scaling.data.arm import Tables
    from scaling.data.episodes import Scale

SCHEMA_VERSION = 1
TRIALS_SEED = 0x747269616C
"""Of the tables of trials, with --seed: no demonstration's is derived from it."""
FLOW_STEPS = 10
"""Of Euler's method, from noise to actions. Default of pi0 (Black et al., 2024)."""
SHOWN = 9
"""Trials in a --gif."""


@dataclass(frozen=True)
class Policy:
    """A model with all that it needs to act."""

    module: "nn.Module"
    spec: Spec
    scales: "dict[str, Scale]"


@dataclass(frozen=True)
class Trials:
    """What came of some trials."""

    succeeded: int
    steps: list[int | None]
    """Of each trial, after how many steps the tip was on the disc."""
    pictures: "list[np.ndarray]"
    """The first tables from above at each step, uint8 [SHOWN, height, width, 3], where they were asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    from scaling.checkpoint.weights import find_weights, is_checkpoint

    source = find_weights(Path(options.source), options.which)
    if not is_checkpoint(source):
        raise CheckpointError(
            f"`RUN_DIR_OR_CHECKPOINT` must be a run folder or a checkpoint of this project, but {source} is none; "
            "look for folders named step-*"
        )
    policy = load_policy(source, untrained=options.untrained, allow_import=options.allow_import)
    found = roll_out(policy, options.trials, options.seed, options.execute, keep_pictures=options.gif is not None)
    report = _report(options, source, found)
    if options.gif:
        _write_gif(Path(options.gif), found)
    if options.json:
        write_output(options.json, json.dumps(report, indent=1) + "\n", "--json")
    low, high = report["interval"]
    print(
        f"{source}{', untrained' if options.untrained else ''}: {found.succeeded} of {options.trials} trials succeed "
        f"(95 % interval: {100 * low:.0f} to {100 * high:.0f} %)"
    )
    return 0


def load_policy(checkpoint: Path, *, untrained: bool = False, allow_import: Sequence[str] = ()) -> Policy:
    """The policy of a checkpoint, or as it was before its training, on the CPU in fp32. `allow_import`: packages that
    a model's own code may come from. Raises CheckpointError and UserError."""
    import torch

    from scaling.checkpoint.format import read_state
    from scaling.checkpoint.weights import open_weights
    from scaling.data.episodes import Scale
    from scaling.models.build import model_recipe
    from scaling.models.recorded import look_at

    state = read_state(checkpoint)
    spec = parse_spec(document_of("spec.json", json.dumps(state["spec"])))
    facts = state.get("data_facts")
    if not isinstance(spec.model, AnyVla) or not isinstance(spec.data, EpisodeData) or not facts:
        raise CheckpointError(
            f'`{checkpoint}` must be of a run with `data.kind` "episodes", but is of "{spec.data.kind}"; train on '
            "demonstrations"
        )
    look_at(spec.model, allow_import)
    recipe = model_recipe(spec, allow_import, filled=True)
    module = recipe.build()
    with torch.no_grad(), closing(open_weights(checkpoint, spec.model)) as weights:
        for name, value in module.named_parameters():
            if untrained:
                value.copy_(recipe.initial_value(name, value.shape))
            else:
                value.copy_(weights.read(name, 0, value.numel()).view_as(value))
    assert {name for name, _ in module.named_parameters()} == {p.name for p in parameters(spec.model)}
    return Policy(module.eval(), spec, {name: Scale.of(scale) for name, scale in facts.items()})


def roll_out(policy: Policy, trials: int, seed: int, execute: int, *, keep_pictures: bool = False) -> Trials:
    """Let the policy try all at the same time. Raises UserError where it was not made for the simulated arm."""
    import numpy as np

    from scaling.data import arm
    from scaling.data.hashing import derive

    data, model = policy.spec.data, policy.spec.model
    assert isinstance(data, EpisodeData) and isinstance(model, AnyVla)
    _check_fits(model, execute)
    tables = arm.start(derive(TRIALS_SEED, seed), np.arange(trials))
    plan = _planner(policy, arm.instructions(tables))
    done: list[int | None] = [None] * trials
    actions, pictures = np.zeros((trials, 0, arm.ACTION_DIM)), list[np.ndarray]()
    for step in range(arm.MOST_STEPS + 1):
        for number in np.flatnonzero(arm.reached(tables)).tolist():
            done[number] = step if done[number] is None else done[number]
        if keep_pictures:
            pictures.append(arm.pictures(arm.some(tables, np.arange(min(SHOWN, trials))), 128)[:, 0])
        if step == arm.MOST_STEPS or None not in done:
            break
        if step % execute == 0:
            actions = plan(tables)
        going = np.array([one is None for one in done])[:, None]  # who is there stays
        tables = arm.move(tables, np.where(going, actions[:, step % execute], 0.0))
    return Trials(sum(step is not None for step in done), done, pictures)


def _planner(policy: Policy, told: Sequence[str]) -> "Callable[[Tables], np.ndarray]":
    """What gives for tables whose instructions these are the chunks of actions, [tables, chunk, action_dim]."""
    import numpy as np
    import torch

    from scaling.data import arm
    from scaling.data.episodes import ARM_PIXELS, instruction_ids
    from scaling.data.lerobot import resized
    from scaling.data.tokenizer import open_tokenizer

    data, model = policy.spec.data, policy.spec.model
    assert isinstance(data, EpisodeData) and isinstance(model, AnyVla)
    tokenizer, size = open_tokenizer(data.tokenizer, instruction_words(model)), model.vision.image_size
    ids = torch.from_numpy(np.stack([instruction_ids(text, tokenizer, data) for text in told]))
    views = [arm.CAMERAS.index(name.rpartition(".")[2]) for name in data.cameras or sorted(arm.CAMERAS)]
    shape = (len(told), model.action.chunk_size, model.action.action_dim)
    noise = torch.Generator().manual_seed(policy.spec.seed)

    def plan(tables: "Tables") -> np.ndarray:
        seen = arm.pictures(tables, ARM_PIXELS)[:, views]
        images = torch.from_numpy(np.stack([[resized(view, size) for view in views] for views in seen]))
        state = torch.from_numpy(policy.scales["state"].apply(arm.state(tables)).astype(np.float32))
        with torch.inference_mode():
            if model.action.head == "direct":
                found = policy.module(images, ids, state)
            else:
                found = torch.randn(shape, generator=noise)
                for step in range(FLOW_STEPS):
                    time = torch.full((len(told),), step / FLOW_STEPS)
                    found = found + policy.module(images, ids, state, found, time) / FLOW_STEPS
        return policy.scales["action"].undo(found.numpy())

    return plan


def _check_fits(model: AnyVla, execute: int) -> None:
    from scaling.data import arm

    wanted = {"state_dim": arm.STATE_DIM, "action_dim": arm.ACTION_DIM}
    for field, size in wanted.items():
        if getattr(model.action, field) != size:
            raise UserError(
                f"`model.action.{field}` must be {size} for the simulated arm, but is {getattr(model.action, field)}; "
                "another robot's policy needs that robot"
            )
    if execute > model.action.chunk_size:
        raise UserError(
            f"`--execute` must be at most `model.action.chunk_size` ({model.action.chunk_size}), but is {execute}; "
            "lower it"
        )


def _report(options: Namespace, source: Path, found: Trials) -> dict[str, Any]:
    took = [step for step in found.steps if step is not None]
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": str(source),
        "untrained": options.untrained,
        "trials": options.trials,
        "seed": options.seed,
        "execute": options.execute,
        "succeeded": found.succeeded,
        "success": found.succeeded / options.trials,
        "interval": wilson(found.succeeded, options.trials),
        "mean_steps": sum(took) / len(took) if took else None,
    }


def wilson(succeeded: int, trials: int) -> tuple[float, float]:
    """The interval that holds the true rate in 95 of 100 cases (Wilson, 1927)."""
    z, share = 1.959964, succeeded / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _write_gif(path: Path, found: Trials) -> None:
    """The first trials side by side, as seen from above."""
    import numpy as np
    from PIL import Image

    from scaling.data.episodes import ARM_FPS

    columns = 3
    frames: list[Image.Image] = []
    for tables in found.pictures:
        rest = -len(tables) % columns
        padded = np.concatenate([tables, np.full((rest, *tables.shape[1:]), 255, np.uint8)])
        rows = padded.reshape(-1, columns, *tables.shape[1:])
        frames.append(Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)))
    try:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // ARM_FPS, loop=0)
    except (OSError, ValueError) as error:
        raise UserError(f"`--gif` must be a .gif file that can be written, but {path} fails: {error}") from None


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.rollout", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", metavar="RUN_DIR_OR_CHECKPOINT")
    parser.add_argument("--which", metavar="latest|best|STEP", help="checkpoint of a run folder (default: latest)")
    parser.add_argument("--trials", type=positive, default=100, help="tables to try (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="other tables (default: 1)")
    parser.add_argument("--execute", type=positive, default=4, help="actions of a chunk to carry out (default: 4)")
    parser.add_argument("--untrained", action="store_true", help="the model as it was before its training")
    parser.add_argument("--json", metavar="FILE", help="the result as JSON")
    parser.add_argument("--gif", metavar="FILE", help=f"the first {SHOWN} trials, to look at")
    add_allow_import(parser)
    return parser


if __name__ == "__main__":
    run_program(main)
