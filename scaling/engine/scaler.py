"""The dynamic loss scale of fp16 (Micikevicius et al., 2018), with the constants and the counting of DeepSpeed's."""

from collections.abc import Mapping


class LossScaler:
    """Halves at a non-finite gradient, never below 1; doubles after every `window` finite steps in a row.

    The first finite step after a non-finite one, or of a run, does not count towards the window: so it is in
    DeepSpeed's DynamicLossScaler, and a run that moves between backends keeps its scale step by step.
    """

    def __init__(self, scale: float = 2.0**16, window: int = 2000) -> None:
        self.scale = scale
        self._window = window
        self._finite = 0

    def update(self, finite: bool) -> None:
        """Take note of a step that was, or was not, finite on all ranks."""
        if not finite:
            self.scale, self._finite = max(1.0, self.scale / 2), 0
            return
        if self._finite and self._finite % self._window == 0:
            self.scale *= 2
        self._finite += 1

    def counters(self) -> dict[str, float]:
        """What `Engine.counters` says of the scale: "loss_scale" and "finite_steps"."""
        return {"loss_scale": self.scale, "finite_steps": float(self._finite)}

    def load(self, counters: Mapping[str, float]) -> None:
        """Go on from `counters`; without a "loss_scale" among them, from where it is."""
        if "loss_scale" in counters:
            self.scale, self._finite = counters["loss_scale"], int(counters["finite_steps"])
