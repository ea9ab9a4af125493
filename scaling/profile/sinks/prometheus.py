"""The newest record as a page in Prometheus' text format, for whoever asks over HTTP.

https://prometheus.io/docs/instrumenting/exposition_formats/, and /docs/practices/naming/ for names and base units.
Numbers, the names of the run and of its parameter groups are all that is said: no host, no path, no setting.
"""

import io
import logging
import math
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from scaling.profile.sinks.guard import tell_failure
from scaling.records import Event, StepRecord, ValidationRecord
from scaling.redact import redacted
from scaling.summarize import at

logger = logging.getLogger("scaling")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATIENCE_S = 2.0
"""How long one request may take from its first byte to its last."""
_PAUSE_S = 0.02
"""Between two requests, which are answered one at a time: whoever asks without pause takes 1 % of a core, not all."""
_MOST_BYTES = 16 * 1024
"""Of a request; a scraper's has some hundred."""


class Prometheus:
    """Answers GET /metrics on one port, in a thread that ends with the process. A port that is taken is told, once."""

    def __init__(self, port: int, host: str = "127.0.0.1", *, run: str) -> None:
        self._address = (host, port)
        self._lock = threading.Lock()
        self._state = State(run)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int | None:
        """Where it listens; None where it does not."""
        return None if self._server is None else self._server.server_address[1]

    def begin(self, first_step: int, last_step: int) -> None:
        self._state.last_step = last_step
        host, port = self._address
        try:
            self._server = _Server(self._address, self.text)
        except (OSError, ValueError) as error:  # taken, no right, no such address, no address
            reason = error.strerror if isinstance(error, OSError) else error
            tell_failure(f"Prometheus ({host} port {port})", reason)
            return
        self._thread = threading.Thread(target=self._server.answer, name="sink Prometheus", daemon=True)
        self._thread.start()
        shown = f"[{host}]" if ":" in host else host
        logger.info(f"metrics for Prometheus: http://{shown}:{self.port}/metrics")

    def step(self, record: StepRecord) -> None:
        with self._lock:
            self._state.step(record)

    def validation(self, record: ValidationRecord) -> None:
        with self._lock:
            self._state.validation = record
            if math.isfinite(record.loss):
                self._state.best_loss = min(record.loss, self._state.best_loss or math.inf)

    def event(self, event: Event) -> None:
        with self._lock:
            self._state.events[event.event] += 1
            if event.event == "checkpoint":
                self._state.checkpoint = event

    def close(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.stop()
            self._thread.join(_PATIENCE_S + 1)

    def text(self) -> str:
        """The page. Made when it is asked for, by the thread that answers."""
        with self._lock:
            families = list(self._state.families())
        return "".join(_family(one, {"run": self._state.run}) for one in families)


# ---------------------------------------------------------------- what is said


@dataclass(frozen=True)
class _Family:
    """A metric under one name."""

    name: str
    kind: str
    """"gauge" or "counter"."""
    help: str
    samples: list[tuple[dict[str, str], Any]]
    """Labels and value; what is no number is left out."""


@dataclass
class State:
    """What the page is made of: the newest records, and sums that only grow."""

    run: str
    last_step: int = 0
    record: StepRecord | None = None
    validation: ValidationRecord | None = None
    best_loss: float | None = None
    checkpoint: Event | None = None
    events: Counter[str] = field(default_factory=Counter[str])
    skipped: int = 0
    pauses: dict[str, float] = field(default_factory=dict[str, float])
    names: dict[str, str] = field(default_factory=dict[str, str])
    """Of parameter groups, without secrets, which takes a look at the whole environment."""
    joules: float | None = None
    xid_errors: int | None = None

    def step(self, record: StepRecord) -> None:
        """Take note of a record."""
        self.record = record
        self.skipped += record.skipped
        for name in record.lr.keys() - self.names.keys():
            self.names[name] = redacted(name)
        for reason, seconds in record.pauses.items():
            self.pauses[reason] = self.pauses.get(reason, 0.0) + seconds
        if (joules := record.energy.get("joules_per_step")) is not None:
            self.joules = (self.joules or 0.0) + joules * record.window_steps
        if (errors := record.device.get("xid_errors")) is not None:
            self.xid_errors = (self.xid_errors or 0) + errors

    def families(self) -> Iterator[_Family]:
        """All metrics, in the order of the page."""
        yield _gauge("last_step", "Optimizer step at which training ends", self.last_step)
        if self.record is not None:
            yield from self._of_step(self.record)
            yield from _of_device(self.record)
            yield from _of_ranks(self.record)
            yield _counter("skipped_steps", "Recorded steps whose update was refused: not finite", self.skipped)
            yield _per("pause_seconds", "reason", "Time that training stood still", self.pauses, kind="counter")
            yield _counter("energy_joules", "Energy of the GPUs of all ranks since this start", self.joules)
            yield _counter("gpu_xid_errors", "XID errors of rank 0's GPU since this start", self.xid_errors)
        if self.validation is not None:
            yield _gauge("validation_loss", "Mean loss of the last validation, nats", self.validation.loss)
            yield _gauge("validation_best_loss", "Lowest loss of a validation since this start", self.best_loss)
            yield _gauge("validation_bits_per_byte", "Of the last validation", self.validation.bits_per_byte)
            for name, value in self.validation.measures.items():
                yield _gauge(f"validation_{name}", "Of the last validation", value)
            yield _gauge("validation_step", "Optimizer steps done at the last validation", self.validation.step)
            yield _gauge("validation_seconds", "How long the last validation took", self.validation.seconds)
        yield from self._of_checkpoints()

    def _of_step(self, record: StepRecord) -> Iterator[_Family]:
        yield _gauge("step", "Optimizer steps done", record.step)
        yield _gauge("record_timestamp_seconds", "When the last record was made", record.wall_time)
        yield _gauge("loss", "Mean training loss of the step, nats", record.loss)
        yield _gauge("gradient_norm", "Global norm of the gradient before clipping", record.grad_norm)
        rates = {self.names[name]: value for name, value in record.lr.items()}
        yield _per("learning_rate", "group", "Learning rate of a parameter group", rates)
        yield _counter("tokens", "Input tokens since the start of training", record.tokens)
        yield _gauge("sequence_length", "Tokens in each sequence of the step, where they grow", record.sequence_length)
        yield _counter("samples", "Sequences since the start of training", record.samples_seen)
        yield _gauge("step_seconds", "Duration of a step, without pauses", record.step_seconds)
        yield _per("step_phase_seconds", "phase", "Duration of a step by phase", record.time)
        yield _gauge("tokens_per_second", "Over all ranks", record.tokens_per_second)
        yield _gauge("device_tokens_per_second", "Tokens per second of one device", record.tokens_per_second_per_device)
        yield _gauge("samples_per_second", "Over all ranks", record.samples_per_second)
        yield _gauge("mfu_ratio", "Model FLOPs utilisation of the card's dense peak", record.mfu)
        yield _gauge("mfu_of_mamf_ratio", "The same of the fastest matrix product measured", record.mfu_of_mamf)
        memory = record.memory
        held = {name.removesuffix("_bytes"): value for name, value in memory.items() if name.endswith("_bytes")}
        yield _per("memory_bytes", "kind", "Memory of rank 0 since the record before", held)
        yield _per("memory_phase_peak_bytes", "phase", "Allocated peak of the recorded step", memory.get("phases"))
        yield _gauge("memory_fragmentation_ratio", "Reserved and not active", memory.get("fragmentation"))
        yield _counter("allocation_retries", "Of the allocator of rank 0", memory.get("allocation_retries"))
        yield _counter("out_of_memory", "Failures of the allocator of rank 0", memory.get("out_of_memory_count"))

    def _of_checkpoints(self) -> Iterator[_Family]:
        if self.checkpoint is not None:
            yield _gauge("checkpoint_step", "Optimizer steps in the last checkpoint", self.checkpoint.step)
            yield _gauge("checkpoint_timestamp_seconds", "When it was whole", self.checkpoint.wall_time)
            yield _gauge("checkpoint_seconds", "How long it took", self.checkpoint.details.get("seconds"))
            yield _gauge("checkpoint_bytes", "Its size", self.checkpoint.details.get("bytes"))
        yield _counter("checkpoints", "Saved since this start", self.events["checkpoint"])
        yield _counter("checkpoint_failures", "Checkpoints that could not be saved", self.events["checkpoint_failed"])
        yield _counter("rollbacks", "Times that training went back to a checkpoint", self.events["rollback"])


def _of_device(record: StepRecord) -> Iterator[_Family]:
    device = record.device
    yield _gauge("gpu_utilization_ratio", "Of rank 0's GPU", device.get("utilization"))
    yield _gauge("gpu_power_watts", "Of rank 0's GPU", device.get("power_watts"))
    yield _gauge("gpu_temperature_celsius", "Highest of rank 0's GPU", device.get("temperature_c"))
    clocks = {"now": device.get("clock_mhz"), "highest": device.get("max_clock_mhz")}
    hertz = {name: value * 1e6 for name, value in clocks.items() if isinstance(value, int | float)}
    yield _per("gpu_clock_hertz", "clock", "Of rank 0's GPU, and the highest it knows", hertz)
    throttle = device.get("throttle")
    yield _gauge(
        "gpu_throttled", "1 where rank 0's GPU was held back", None if throttle is None else int(bool(throttle))
    )
    yield _gauge("gpu_ecc_errors", "Of rank 0's GPU", device.get("ecc_errors"))
    yield _gauge("step_energy_joules", "Of the GPUs of all ranks", record.energy.get("joules_per_step"))


def _of_ranks(record: StepRecord) -> Iterator[_Family]:
    """Spread over ranks, in families of one unit each."""
    if record.ranks is None:
        return
    yield _gauge("ranks", "Processes that train together", record.ranks.get("count"))
    for name, label, text, names in (
        ("rank_phase_seconds", "phase", "Phases of a step, over ranks", (*record.time, "busy")),
        ("rank_memory_bytes", "kind", "Memory, over ranks", ("allocated_peak_bytes", "host_rss_bytes")),
    ):
        samples = [
            ({label: quantity.removesuffix("_bytes"), "over": over}, at(record.ranks, "of", quantity, over))
            for quantity in names
            for over in ("min", "mean", "max")
        ]
        yield _Family(name, "gauge", text, samples)
    for end in ("slowest", "fastest"):
        yield _gauge(f"{end}_rank", "Number of the rank, by its busy time", at(record.ranks, end, "rank"))


def _gauge(name: str, text: str, value: Any) -> _Family:
    return _Family(name, "gauge", text, [({}, value)])


def _counter(name: str, text: str, value: Any) -> _Family:
    return _Family(f"{name}_total", "counter", text, [({}, value)])


def _per(name: str, label: str, text: str, values: Mapping[str, Any] | None, *, kind: str = "gauge") -> _Family:
    samples = [({label: key}, value) for key, value in (values or {}).items()]
    return _Family(f"{name}_total" if kind == "counter" else name, kind, text, samples)


def _family(family: _Family, labels: dict[str, str]) -> str:
    """The lines of one metric; none where nothing of it is known."""
    name = f"scaling_{family.name}"
    lines = [
        f"{name}{{{_labels({**labels, **more})}}} {_number(value)}"
        for more, value in family.samples
        if isinstance(value, int | float)
    ]
    help_text = family.help.replace("\\", "\\\\").replace("\n", "\\n")
    head = [f"# HELP {name} {help_text}", f"# TYPE {name} {family.kind}"]
    return "".join(f"{line}\n" for line in (*head, *lines)) if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return repr(value)


# ---------------------------------------------------------------- who answers


class _Server(socketserver.TCPServer):
    """One request at a time. (http.server's own class looks its host's name up, which can take seconds.)"""

    allow_reuse_address = True  # of an earlier start, whose connections the kernel still remembers
    request_queue_size = 8
    timeout = 0.5

    def __init__(self, address: tuple[str, int], text: Any) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.text = text
        self._stopped = False
        super().__init__(address, _Handler)

    def answer(self) -> None:
        """Until stopped."""
        with self:
            while not self._stopped:
                self.handle_request()
                time.sleep(_PAUSE_S)

    def stop(self) -> None:
        """Make `answer` return soon."""
        self._stopped = True
        with suppress(OSError):  # where a listening socket cannot be shut down, `timeout` has to pass
            self.socket.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone, or was too slow: nobody else's matter."""


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of two pages."""

    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _PATIENCE_S
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Hurried(self.connection))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(CONTENT_TYPE, self.server.text())
        elif path == "/":
            self._answer(
                "text/html; charset=utf-8", '<!doctype html><title>scaling</title><a href="/metrics">metrics</a>\n'
            )
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def version_string(self) -> str:
        return "scaling"  # not which Python has which holes

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log is of the training."""

    def _answer(self, content_type: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.connection.settimeout(_PATIENCE_S)
            self.wfile.write(body)


class _Hurried(io.RawIOBase):
    """What a client sends, as long as all of it is there in time and not too much."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = time.monotonic() + _PATIENCE_S
        self._left = _MOST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._until - time.monotonic()
        if left_s <= 0 or self._left <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)
        count = self._connection.recv_into(buffer)
        self._left -= count
        return count
