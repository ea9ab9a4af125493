"""Telling from an error that memory has run out, and what is known of it at that moment."""

import errno
import re
from dataclasses import dataclass, field

COPY, REST = "copy that is saved", "activations and other"
"""Categories of what is held that are no part of the training state."""
_SAID = (
    "out of memory",  # CUDA's caching allocator and driver, HIP's, NCCL ("Cuda failure 2 'out of memory'")
    "can't allocate memory",  # torch's CPU allocator (c10/core/impl/alloc_cpu.cpp) on Linux
    "not enough memory",  # the same on other systems
    "cannot allocate memory",  # strerror(ENOMEM), as mmap and shared memory say it
    "alloc_failed",  # CUBLAS_, CUDNN_, CUSOLVER_, CUSPARSE_STATUS_ALLOC_FAILED
    "std::bad_alloc",
    "failed to cuda calloc",  # NCCL
    "failed to allocate memory",  # oneDNN, gloo
)
_HOST = ("can't allocate memory", "not enough memory", "cannot allocate memory", "std::bad_alloc", "memoryerror")
"""What is said of host memory alone."""
_ASKED = re.compile(r"allocate (?:a buffer of )?(\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)", re.IGNORECASE)
"""torch: "Tried to allocate 2.00 GiB", "you tried to allocate 4096 bytes"; numpy: "Unable to allocate 1.00 GiB"."""
_UNITS = {"bytes": 1} | {unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)}


@dataclass(frozen=True)
class Held:
    """What a process held when it asked for more than there was. Bytes; None is what is not known."""

    allocated_bytes: int | None = None
    """Of the GPU, by torch's tensors."""
    reserved_bytes: int | None = None
    """Of the GPU, by torch's caching allocator: what it has taken from the driver."""
    host_rss_bytes: int | None = None
    """Resident in host memory."""
    limit_bytes: int | None = None
    """What the process could have had: on a GPU what the allocator held and what was free, on the host its limit."""
    limit_name: str = ""
    """What sets the limit, in words."""
    free_bytes: int | None = None
    """What was left of it."""
    parts: dict[str, int] = field(default_factory=dict[str, int])
    """Of the device's memory, by category: parameters, gradients, optimizer, COPY, REST."""

    @property
    def bytes(self) -> int:
        """All that is known to be held by tensors on the device."""
        return sum(self.parts.values()) if self.allocated_bytes is None else self.allocated_bytes


class Exhausted(Exception):
    """Memory has run out, and what was held is noted. Frees what the failed call held before it is raised."""

    def __init__(
        self, stage: str, message: str, asked_bytes: int | None, held: Held, *, of_host: bool, rank: int | None = None
    ) -> None:
        super().__init__(stage, message, asked_bytes, held)
        self.stage = stage
        """What the process was at: "build", "restore" or "save", if no step was under way."""
        self.message = message
        self.asked_bytes = asked_bytes
        self.held = held
        self.of_host = of_host
        """It is host memory that was short, whatever the device."""
        self.rank = rank
        """Whose memory it is; None: that of the process that raises it. With a rank every rank raises it alike."""


def is_exhausted(error: BaseException) -> bool:
    """Whether `error`, or what it came of, says that memory has run out: the device's or the host's."""
    return any(_is_exhausted(one) for one in _chain(error))


def is_of_host(error: BaseException) -> bool:
    """Whether it is host memory that ran out, as far as the error tells."""
    found = [one for one in _chain(error) if _is_exhausted(one)]
    return any(isinstance(one, MemoryError | OSError) or _says(one, _HOST) for one in found)


def asked_bytes(text: str) -> int | None:
    """How much was asked for, where a message says so."""
    found = _ASKED.search(text)
    return None if found is None else round(float(found[1]) * _UNITS[found[2].lower()])


def message_of(error: BaseException, most: int = 400) -> str:
    """The first line of what says that memory has run out."""
    said = next((one for one in _chain(error) if _is_exhausted(one)), error)
    lines = str(said).strip().splitlines()
    return (lines[0] if lines else type(said).__name__)[:most]


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in found:
        found.append(seen)
        seen = seen.__cause__ or seen.__context__
    return found


def _is_exhausted(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch.OutOfMemoryError, AcceleratorError and DistBackendError are RuntimeErrors.
    return isinstance(error, RuntimeError) and _says(error, _SAID)


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(words in text for words in phrases)
