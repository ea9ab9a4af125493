"""Telling from a collective's error that the fault lies with another rank."""

_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "remote process exited",  # NCCL
    "ncclremoteerror",
    "ncclsystemerror",
    "connection was likely closed",  # torch's TCPStore
    "failed to recv, got 0 bytes",
)
_LATE = ("timed out waiting", "watchdog caught collective operation timeout", "wait timeout")


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return _says(error, _LOST)


def is_late_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not come in the time-out of the process group."""
    return _says(error, _LATE)


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        # torch's DistBackendError, DistNetworkError and the like are RuntimeErrors.
        if isinstance(seen, RuntimeError) and any(phrase in str(seen).lower() for phrase in phrases):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
