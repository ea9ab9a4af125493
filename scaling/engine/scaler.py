"""The dynamic loss scale of fp16 (Micikevicius et al., 2018), with the constants rendered for DeepSpeed too."""


class LossScaler:
    """Halves at a non-finite gradient, doubles after `window` finite steps in a row; never below 1."""

    def __init__(self, scale: float = 2.0**16, window: int = 2000) -> None:
        self.scale = scale
        self._window = window
        self._finite = 0

    def update(self, finite: bool) -> None:
        """Take note of a step that was, or was not, finite on all ranks."""
        self._finite = self._finite + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self._finite == self._window:
            self.scale, self._finite = self.scale * 2, 0
