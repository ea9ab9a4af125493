"""What the driver says of this process's GPU, through pynvml, from a thread of its own.

A driver answers within microseconds, within tens of milliseconds while other processes allocate, and after some faults
never. So training asks it nothing: a daemon thread samples, and `DeviceMonitor.read` tells what the samples since the
last read come to (`scaling.profile.window`). What the driver does not say is None, never a guess.

A MIG instance shares its card with others. Its memory is its own; temperature, clocks, their throttling and ECC errors
are the card's, of which there is one; XID errors are those of the instance and of the card as a whole. Utilisation,
power and energy are None: the driver knows them of the card alone, and no share of them is anybody's.
"""

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pynvml

from scaling.profile.window import UNKNOWN, Window

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("scaling")

REASONS = {
    pynvml.nvmlClocksThrottleReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksThrottleReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "hw_power_brake_slowdown",
}
"""Why clocks are below what was asked for, named as nvidia-smi does. Left out: an idle GPU, and clocks that somebody
has set (application and display clocks)."""

UNSUPPORTED = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_VGPU_ECC_NOT_SUPPORTED,
)
"""Answers to a first question that say: never here. Not worth a word."""

CLOSING_S = 2.0
"""How long `close` waits for the thread: its calls take milliseconds, unless the driver hangs."""

MOST_EVENTS = 100
"""XID errors looked at in one sample."""

INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO in include/linux/proc_ns.h of Linux."""


class DeviceMonitor:
    """Watches one device while a run trains. Of a CPU it knows nothing, and costs nothing."""

    def __init__(self, device: "torch.device", *, interval_s: float = 1.0) -> None:
        """`interval_s`: seconds between two samples."""
        self._sampler: Sampler | None = None
        if device.type == "cuda":
            import torch

            uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "unknown")
            self._sampler = Sampler(str(uuid), interval_s=interval_s, pid=_driver_pid())

    def read(self) -> dict[str, Any]:
        """What was gathered since the last read, or what the latest sample said where there was none since.

        "used_bytes" of all processes and "process_bytes" of this one, "temperature_c" (highest of each); "utilization"
        (0 to 1), "power_watts", "clock_mhz" (means); "max_clock_mhz"; "throttle" (sorted reasons, REASONS);
        "ecc_errors" (uncorrected) and "xid_errors" (new ones); "energy_joules". Asks no driver and waits for none.
        """
        return dict(UNKNOWN) if self._sampler is None else self._sampler.read()

    def close(self) -> None:
        """End the watch; what it has gathered can still be read."""
        if self._sampler is not None:
            self._sampler.close()


class Sampler:
    """The thread, and what it has gathered."""

    def __init__(self, uuid: str, *, interval_s: float, pid: int | None = None) -> None:
        """`uuid` as torch or nvidia-smi writes it; `pid`: what the driver calls this process, if that is known."""
        self._window = Window(interval_s)
        self._began_s = time.monotonic()
        self._told_silence = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=(uuid, pid, interval_s), name="scaling-device", daemon=True
        )
        self._thread.start()
        # A thread within the driver while the process unloads it might crash the end of a run.
        atexit.register(self.close)

    def read(self) -> dict[str, Any]:
        """See DeviceMonitor."""
        now_s = time.monotonic()
        with self._lock:
            found = self._window.take(now_s)
            silent_s = now_s - max(self._began_s, self._window.heard_s)
        if silent_s > self._window.patience_s and self._thread.is_alive() and not self._told_silence:
            self._told_silence = True
            logger.warning(
                "the GPU's driver has not answered for %.0f s: its readings are null until it does", silent_s
            )
        return found

    def close(self) -> None:
        """See DeviceMonitor."""
        atexit.unregister(self.close)
        self._stop.set()
        self._thread.join(CLOSING_S)

    def _watch(self, uuid: str, pid: int | None, interval_s: float) -> None:
        try:
            with _driver(), _Card(uuid, pid) as card:
                while not self._stop.is_set():
                    at_s = time.monotonic()
                    sample = card.sample()
                    with self._lock:
                        self._window.add(at_s, sample)
                    self._stop.wait(interval_s)
        except Exception as error:  # most likely there is no driver; a bug of ours should end no run either
            name = "" if isinstance(error, pynvml.NVMLError) else f"{type(error).__name__}: "
            logger.warning("the GPU's memory, power, temperature and clocks are not recorded: %s%s", name, error)


# ---------------------------------------------------------------- the driver


class _Card:
    """Asks for all there is; says once what the driver no longer answers."""

    def __init__(self, uuid: str, pid: int | None) -> None:
        card, part = _find(uuid)
        self._resources = contextlib.ExitStack()
        self._questions = _questions(card, part, pid, self._resources)
        self._answered: set[str] = set()
        self._said: set[str] = set()

    def __enter__(self) -> "_Card":
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def sample(self) -> dict[str, Any]:
        """Name -> value, of what is known; see `Window`."""
        found: dict[str, Any] = {}
        failed: dict[str, list[str]] = {}
        for name, question in list(self._questions.items()):
            try:
                found[name] = question()
                self._answered.add(name)
            except Exception as error:  # of NVML, or of pynvml where the library is not as it expects
                if name not in self._answered and _code(error) in UNSUPPORTED:
                    del self._questions[name]
                elif name not in self._said:
                    self._said.add(name)
                    failed.setdefault(str(error), []).append(name)
        for error, names in failed.items():
            logger.warning("the GPU's driver has no answer for %s: %s", ", ".join(names), error)
        return found


def _questions(card: Any, part: Any, pid: int | None, resources: contextlib.ExitStack) -> dict[str, Callable[[], Any]]:
    """What is asked, by the names of a sample; energy first, since the sample has the time of it.

    `part` of a card: itself, a MIG instance, or None for an instance that is not known.
    """
    questions: dict[str, Callable[[], Any]] = {}
    if part is card:
        questions |= {
            "energy_joules": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000,  # it is in millijoules
            "power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(card) / 1000,  # milliwatts
            "utilization": lambda: int(pynvml.nvmlDeviceGetUtilizationRates(card).gpu) / 100,  # per cent
        }
    questions |= {
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU),
        "clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
        "max_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_SM),
        "throttle": lambda: _throttling(card),
        "ecc_errors": lambda: pynvml.nvmlDeviceGetTotalEccErrors(
            card, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        ),
    }
    if part is not None:
        questions["used_bytes"] = lambda: int(pynvml.nvmlDeviceGetMemoryInfo(part).used)
        if pid is not None:
            questions["process_bytes"] = lambda: _process_bytes(part, pid)
        with contextlib.suppress(pynvml.NVMLError):  # no events under WSL, nor in some containers
            questions["xid_errors"] = _xid_counter(card, part, resources)
    return questions


@contextlib.contextmanager
def _driver() -> Iterator[None]:
    """NVML at work; it counts its users, of which torch may be one."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _find(uuid: str) -> tuple[Any, Any]:
    """The card, and which part of it is ours: itself, a MIG instance, or None where the instance is not known.

    torch writes bare UUIDs (`_CudaDeviceProperties.uuid`). Under MIG they are the instance's, or with an older CUDA the
    card's (see cuDeviceGetUuid and its _v2); CUDA_VISIBLE_DEVICES then says which instance, if it names one.
    """
    for name in (uuid,) if uuid.startswith(("GPU-", "MIG-")) else (f"GPU-{uuid}", f"MIG-{uuid}"):
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            if name.startswith("MIG-"):
                return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle), handle
            return handle, _visible_instance() if _is_cut(handle) else handle
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


def _is_cut(card: Any) -> bool:
    """The card is in MIG mode, in which nobody computes on the whole of it."""
    with contextlib.suppress(pynvml.NVMLError):
        return pynvml.nvmlDeviceGetMigMode(card)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    return False


def _visible_instance() -> Any:
    """The MIG instance that CUDA uses, the first that it sees; None where it was not told which."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first.startswith("MIG-"):
        with contextlib.suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(first)
    return None


def _throttling(card: Any) -> list[str]:
    """The names of REASONS that hold."""
    try:
        bits = pynvml.nvmlDeviceGetCurrentClocksEventReasons(card)
    except pynvml.NVMLError as error:
        if _code(error) != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)  # its name before driver 535
    return [name for bit, name in REASONS.items() if bits & bit]


def _process_bytes(part: Any, pid: int) -> int | None:
    """Memory of one process; None where the driver does not know it."""
    mine = [one.usedGpuMemory for one in pynvml.nvmlDeviceGetComputeRunningProcesses_v3(part) if one.pid == pid]
    return None if not mine or None in mine else sum(mine)


def _driver_pid() -> int | None:
    """What the driver calls this process; None in a container, where it may call another one so."""
    with contextlib.suppress(OSError):
        if os.readlink("/proc/self/ns/pid") == INITIAL_PID_NAMESPACE:
            return os.getpid()
    return None


def _xid_counter(card: Any, part: Any, resources: contextlib.ExitStack) -> Callable[[], int]:
    """Counts the critical errors that the driver reports from now on, and says the number of each kind once."""
    instance = None if part is card else pynvml.nvmlDeviceGetGpuInstanceId(part)
    events = pynvml.nvmlEventSetCreate()
    resources.callback(_free, events)
    pynvml.nvmlDeviceRegisterEvents(card, pynvml.nvmlEventTypeXidCriticalError, events)
    total = 0
    said: set[int] = set()

    def count() -> int:
        nonlocal total
        for event in _waiting(events):
            # Of another instance; what belongs to none has all bits set (nvmlEventData_t in nvml.h).
            if instance is not None and event.gpuInstanceId not in (instance, 0xFFFFFFFF):
                continue
            total += 1
            if event.eventData not in said:
                said.add(event.eventData)
                logger.warning("the GPU's driver reports XID error %d", event.eventData)
        return total

    return count


def _waiting(events: Any) -> Iterator[Any]:
    for i in range(MOST_EVENTS):
        try:
            yield pynvml.nvmlEventSetWait_v2(events, 0)
        except pynvml.NVMLError as error:
            # A GPU that is lost says so by an event first; the error itself comes again with the next sample.
            if i > 0 or _code(error) == pynvml.NVML_ERROR_TIMEOUT:
                return
            raise


def _free(events: Any) -> None:
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlEventSetFree(events)


def _code(error: Exception) -> int:
    return getattr(error, "value", pynvml.NVML_ERROR_UNKNOWN)
