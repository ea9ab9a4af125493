"""Where records go: files, TensorBoard, W&B, Prometheus, the terminal. Only rank 0 has any."""

from scaling.profile.sinks.build import build_sinks, check_tracking
from scaling.profile.sinks.files import JsonLines, Memory
from scaling.profile.sinks.guard import InBackground, guarded
from scaling.profile.sinks.live import Live
from scaling.profile.sinks.prometheus import Prometheus
from scaling.profile.sinks.sink import Sink
from scaling.profile.sinks.tensorboard import TensorBoard
from scaling.profile.sinks.terminal import Terminal
from scaling.profile.sinks.wandb import WandB

__all__ = [
    "InBackground",
    "JsonLines",
    "Live",
    "Memory",
    "Prometheus",
    "Sink",
    "TensorBoard",
    "Terminal",
    "WandB",
    "build_sinks",
    "check_tracking",
    "guarded",
]
