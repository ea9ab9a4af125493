"""Weights & Biases: its client is loaded here alone, and records nothing but what it is given."""

import importlib
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.profile.sinks.scalars import step_scalars, validation_scalars
from scaling.records import Event, StepRecord, ValidationRecord
from scaling.redact import redacted_json
from scaling.run_folder import write_json
from scaling.spec.sections import Wandb

logger = logging.getLogger("scaling")

WANDB = "wandb.json"
"""In the run folder: the id under which a run that goes on is continued."""
INIT_S, FINISH_S = 60.0, 15.0
"""How long its service may take to begin, and at the end to send what is left: whoever stops a run often gives it no
more than half a minute. What is not sent stays in the run folder, for `wandb sync`.
"""
_ONLY_WHAT_IS_LOGGED = {
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "x_disable_meta": True,  # the command line, the user, the machine
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "host": "",
    "program": "",
    "silent": True,  # this run's log says where it is
    "login_timeout": 1.0,  # nobody answers a prompt for the key in the midst of a start
}
"""Settings of the client. Those with an x_ may change between its versions: one that it does not know it refuses."""


class WandB:
    """One run of W&B for one run folder, resumed with it."""

    def __init__(self, settings: Wandb, folder: Path, *, name: str, config: dict[str, Any]) -> None:
        check_wandb()
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its client's own errors, to its makers
        # It takes a second or two: before training begins.
        self._wandb: Any = importlib.import_module("wandb")
        self._settings = settings
        self._folder = folder
        self._name = name
        self._config = redacted_json(config)
        self._code = 0
        self._run: Any = None

    def begin(self, first_step: int, last_step: int) -> None:
        given, online = self._settings, self._settings.mode == "online"
        self._run = self._wandb.init(
            project=given.project,
            entity=given.entity,
            group=given.group,
            tags=list(given.tags),
            mode=given.mode,
            name=self._name,
            id=run_id(self._folder),
            resume="allow" if online else None,  # offline it is `wandb sync` that joins runs of one id
            dir=str(self._folder),
            config=self._config,
            settings=self._wandb.Settings(**_ONLY_WHAT_IS_LOGGED, init_timeout=INIT_S, finish_timeout=FINISH_S),
        )
        if self._run.disabled:
            raise RuntimeError('no key is known; run `wandb login`, or set `tracking.wandb.mode` to "offline"')
        # Steps that a crash made the run repeat come twice: W&B's own step may not go back, an axis of ours may.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        where = self._run.url if online else f"offline, for `wandb sync {Path(self._run.dir).parent}`"
        logger.info(f"W&B: {where}")

    def step(self, record: StepRecord) -> None:
        self._run.log({**step_scalars(record), "step": record.step})

    def validation(self, record: ValidationRecord) -> None:
        self._run.log({**validation_scalars(record), "step": record.step})

    def event(self, event: Event) -> None:
        if event.event == "end":
            self._code = event.details.get("code") or 0

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=self._code)


def check_wandb() -> None:
    """UserError where the client is not installed."""
    # A folder named wandb, as its client leaves them behind, is a package of this name too, with nothing in it.
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:
        raise UserError(
            "`tracking.wandb` must be null where W&B's client is not installed, but is not; run "
            "`pip install 'scaling[wandb]'`, or set it to null"
        )


def run_id(folder: Path) -> str:
    """The id of this run folder at W&B, made when it is first asked for."""
    path = folder / WANDB
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(found, str) and found.isalnum():
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = os.urandom(4).hex()
    write_json(path, {"id": made})
    return made
