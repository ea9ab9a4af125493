"""What the driver says of this process's GPU, through pynvml. No driver, or no answer: None, never a guess."""

import contextlib
from typing import Any

import pynvml
import torch

UNKNOWN: dict[str, float | None] = {
    "used_bytes": None,
    "utilization": None,
    "power_watts": None,
    "temperature_c": None,
}


class DeviceMonitor:
    """Reads one GPU, found by its UUID so that CUDA_VISIBLE_DEVICES cannot mislead."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type != "cuda":
            return
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

    def read(self) -> dict[str, float | None]:
        """Memory in use by all processes (bytes), utilisation (0 to 1), power (W) and temperature (deg C)."""
        if self._handle is None:
            return dict(UNKNOWN)
        return {
            "used_bytes": _ask(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)),
            "utilization": _ask(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100),
            "power_watts": _ask(lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000),
            "temperature_c": _ask(lambda: pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU)),
        }


def _ask(question: Any) -> Any:
    try:
        return question()
    except pynvml.NVMLError:
        return None
