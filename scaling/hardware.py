"""Facts about GPUs: what they hold and how fast they are. A field without a source is None, never a guess.

Rates are in units of 1 per second with decimal prefixes (989e12 FLOP/s, 3.35e12 bytes/s), memory is bytes. Peaks are
dense, without sparsity. Sources, named beside each number:

    ML     github.com/stas00/ml-engineering, compute/accelerator and network: peaks, achievable matmul, HBM, links
    TT     github.com/pytorch/torchtitan, torchtitan/tools/utils.py, get_peak_flops
    NC     github.com/karpathy/nanochat, nanochat/common.py, get_peak_flops
    LA     github.com/cli99/llm-analysis, gpu_configs/*.json
    FA     attention kernels: Dao, FlashAttention-2 (2023), section 4.1; Shah et al., FlashAttention-3 (2024), figure 5
    DS     the vendor's data sheet
    log    the total capacity in torch's own out-of-memory messages, as people post them; it is what
           torch.cuda.get_device_properties().total_memory reports, a little less than the driver's and the vendor's
    PCIe   the bus's arithmetic: 8, 16 or 32 GT/s x 16 lanes x 128/130 / 8 bits for generations 3, 4 and 5
"""

import difflib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from scaling.errors import UserError
from scaling.units import GiB

_PCIE3, _PCIE4, _PCIE5 = (rate * 1e9 * 16 * 128 / 130 / 8 for rate in (8, 16, 32))
"""Bytes/s in one direction over 16 lanes: 15.75, 31.5 and 63.0 GB/s."""


@dataclass(frozen=True)
class Measured:
    """What a card was measured to sustain on a machine (`python -m scaling.calibrate`). None: not measured.

    The planner takes these rates as they are. From the peaks of a `GPU`, which stay what they are beside it (MFU is
    of a peak), it makes rates by factors, of which none applies here.
    """

    device: str | None = None
    """What was measured: the card's name in full, or the processor's."""
    device_type: Literal["cuda", "cpu"] | None = None
    """torch's. "cpu": what stands for a GPU is a process on its share of the processor's cores."""
    bf16_matmul_flops: float | None = None
    """Large matrix products, FLOP/s."""
    fp16_matmul_flops: float | None = None
    fp32_matmul_flops: float | None = None
    bf16_attention_flops: float | None = None
    """Forward pass of torch's attention, long sequences without a mask, FLOP/s."""
    fp16_attention_flops: float | None = None
    fp32_attention_flops: float | None = None
    hbm_bytes_per_s: float | None = None
    """The device's own memory, read and written together; of a CPU its host memory."""
    host_bytes_per_s: float | None = None
    """Between pinned host memory and the device, the slower direction, all GPUs of the node at once."""
    all_gather_bytes_per_s: float | None = None
    """Bus bandwidth within a node: (n - 1)/n of the gathered bytes over the time that n ranks took."""
    all_reduce_bytes_per_s: float | None = None
    """The same of an all-reduce: 2 (n - 1)/n of its bytes over the time."""
    network_bytes_per_s: float | None = None
    """Bus bandwidth of an all-gather over several nodes, divided by the ranks of a node: each one's share."""

    def matmul_flops(self, precision: Literal["bf16", "fp16", "fp32"]) -> float | None:
        """Of matrix products at `precision`."""
        return {"bf16": self.bf16_matmul_flops, "fp16": self.fp16_matmul_flops, "fp32": self.fp32_matmul_flops}[
            precision
        ]

    def attention_flops(self, precision: Literal["bf16", "fp16", "fp32"]) -> float | None:
        """Of attention's forward pass at `precision`."""
        return {
            "bf16": self.bf16_attention_flops, "fp16": self.fp16_attention_flops, "fp32": self.fp32_attention_flops
        }[precision]  # fmt: skip


@dataclass(frozen=True)
class GPU:
    """One kind of GPU. None: no source known here."""

    name: str
    """As in `--gpus 8xNAME`."""
    device_names: tuple[str, ...]
    """What torch.cuda.get_device_name and nvidia-smi call it, in full."""
    memory_bytes: int | None
    """torch's total_memory: what the driver leaves to all processes together."""
    bf16_flops: float | None
    """Dense peak of bf16 matrix products with fp32 accumulation, FLOP/s; None where the chip has no bf16 units."""
    fp16_flops: float | None
    """The same for fp16."""
    matmul_flops: float | None
    """The most that a bf16 matmul was measured to reach (ML's MAMF), FLOP/s."""
    hbm_bytes_per_s: float | None
    """Device memory bandwidth."""
    link_bytes_per_s: float | None
    """From one GPU to the others of its node, in one direction: NVLink or xGMI where it has it, else the PCIe bus."""
    host_bytes_per_s: float | None
    """Between GPU and host memory, in one direction."""
    network_bytes_per_s: float | None
    """Each GPU's share of the network in the vendor's own 8-GPU node, in one direction; clusters differ widely."""
    attention_flops: float | None = None
    """The most that the forward pass of torch's flash attention (FlashAttention-2) was measured to reach, FLOP/s: long
    sequences, heads of 128."""
    fp32_flops: float | None = None
    """Peak of fp32 matrix products without tensor cores, as torch computes them unless told otherwise, FLOP/s."""
    measured: Measured = Measured()
    """Rates that go before those above; of the cards in the table here nothing was measured."""

    @property
    def is_cpu(self) -> bool:
        """A process on a CPU stands in for it."""
        return self.measured.device_type == "cpu"

    def peak_flops(self, precision: Literal["bf16", "fp16", "fp32"]) -> float | None:
        """Dense matmul peak in FLOP/s at `precision`, the denominator of MFU; None where it is not known."""
        return {"bf16": self.bf16_flops, "fp16": self.fp16_flops, "fp32": None}[precision]


@dataclass(frozen=True)
class Cluster:
    """What a job runs on: equal nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: GPU

    @property
    def world_size(self) -> int:
        """One rank per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def name(self) -> str:
        """As `parse_gpus` reads it."""
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node}x{self.gpu.name}"


def _gib(size: float) -> int:
    return round(size * GiB)


GPUS = (
    GPU(
        name="H100-80GB",
        device_names=("NVIDIA H100 80GB HBM3",),
        memory_bytes=_gib(79.11),  # log: NVIDIA-NeMo/Automodel#2673, vllm#27508
        bf16_flops=989e12,  # ML, TT
        fp16_flops=989e12,  # ML
        matmul_flops=794.5e12,  # ML
        hbm_bytes_per_s=3.35e12,  # ML
        link_bytes_per_s=450e9,  # ML: NVLink 4
        host_bytes_per_s=_PCIE5,
        network_bytes_per_s=50e9,  # ML: DGX/HGX, eight 400 Gb/s NICs
        attention_flops=370e12,  # FA: FlashAttention-2 on this card
        fp32_flops=66.9e12,  # DS
    ),
    GPU(
        name="H100-96GB",  # HBM2e at 500 W, as in torchtitan's published tables
        device_names=(),  # calls itself "NVIDIA H100", which says too little to recognise it
        memory_bytes=_gib(95.04),  # torchtitan benchmarks
        bf16_flops=989e12,  # TT: nominal, the chip is power-capped
        fp16_flops=989e12,  # as bf16, the same tensor cores
        matmul_flops=None,
        hbm_bytes_per_s=2.4e12,  # torchtitan benchmarks
        link_bytes_per_s=450e9,  # ML: NVLink 4
        host_bytes_per_s=_PCIE5,
        network_bytes_per_s=50e9,  # torchtitan benchmarks: 400 Gb/s per GPU
        fp32_flops=66.9e12,  # as the other SXM cards, nominal
    ),
    GPU(
        name="H100-PCIe-80GB",
        device_names=("NVIDIA H100 PCIe",),
        memory_bytes=None,
        bf16_flops=756e12,  # ML, TT
        fp16_flops=756e12,  # ML
        matmul_flops=None,
        hbm_bytes_per_s=2.0e12,  # ML
        link_bytes_per_s=_PCIE5,  # without the bridge that joins pairs
        host_bytes_per_s=_PCIE5,
        network_bytes_per_s=None,
        fp32_flops=51.2e12,  # DS
    ),
    GPU(
        name="H100-NVL-94GB",
        device_names=("NVIDIA H100 NVL",),
        memory_bytes=_gib(93.10),  # log
        bf16_flops=835e12,  # TT, NC
        fp16_flops=835e12,  # as bf16, the same tensor cores
        matmul_flops=None,
        hbm_bytes_per_s=3.9e12,  # DS
        link_bytes_per_s=_PCIE5,  # without the bridge that joins pairs
        host_bytes_per_s=_PCIE5,
        network_bytes_per_s=None,
    ),
    GPU(
        name="H200",
        device_names=("NVIDIA H200",),
        memory_bytes=_gib(139.80),  # log
        bf16_flops=989e12,  # ML, TT
        fp16_flops=989e12,  # ML
        matmul_flops=794.5e12,  # ML: the compute of an H100
        hbm_bytes_per_s=4.8e12,  # ML
        link_bytes_per_s=450e9,  # ML: NVLink 4
        host_bytes_per_s=_PCIE5,
        network_bytes_per_s=50e9,  # ML: DGX/HGX, eight 400 Gb/s NICs
        attention_flops=370e12,  # the compute of an H100
        fp32_flops=66.9e12,  # DS
    ),
    GPU(
        name="A100-80GB",
        device_names=(
            "NVIDIA A100-SXM4-80GB",
            "A100-SXM4-80GB",
            "A100-SXM-80GB",
        ),  # drivers before 470 leave NVIDIA out
        memory_bytes=_gib(79.15),  # log: vllm#4408; others show up to 79.25
        bf16_flops=312e12,  # ML, TT
        fp16_flops=312e12,  # ML
        matmul_flops=271.2e12,  # ML
        hbm_bytes_per_s=2.0e12,  # ML (LA: 2.039)
        link_bytes_per_s=300e9,  # ML: NVLink 3
        host_bytes_per_s=_PCIE4,
        network_bytes_per_s=25e9,  # DS: DGX A100, eight 200 Gb/s NICs; clouds have from 6.25 GB/s (ML) upwards
        attention_flops=0.73 * 312e12,  # FA: 73 % of the peak
        fp32_flops=19.5e12,  # DS
    ),
    GPU(
        name="A100-PCIe-80GB",
        device_names=("NVIDIA A100 80GB PCIe",),
        memory_bytes=None,
        bf16_flops=312e12,  # ML, TT
        fp16_flops=312e12,  # ML
        matmul_flops=252.9e12,  # ML
        hbm_bytes_per_s=1.94e12,  # ML
        link_bytes_per_s=_PCIE4,  # without the bridge that joins pairs
        host_bytes_per_s=_PCIE4,
        network_bytes_per_s=None,
        attention_flops=0.73 * 312e12,  # FA, measured on the 80 GB SXM card
        fp32_flops=19.5e12,  # DS
    ),
    GPU(
        name="A100-40GB",
        device_names=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        memory_bytes=42_298_834_944,  # deviceQuery in bottlerocket-os/bottlerocket#3873: 39.39 GiB
        bf16_flops=312e12,  # ML, TT
        fp16_flops=312e12,  # ML
        matmul_flops=None,
        hbm_bytes_per_s=1.555e12,  # LA
        link_bytes_per_s=300e9,  # ML: NVLink 3
        host_bytes_per_s=_PCIE4,
        network_bytes_per_s=6.25e9,  # ML: AWS P4d, four 100 Gb/s NICs a node
        attention_flops=0.73 * 312e12,  # FA, measured on the 80 GB SXM card
        fp32_flops=19.5e12,  # DS
    ),
    GPU(
        name="L40S",
        device_names=("NVIDIA L40S",),
        memory_bytes=_gib(44.39),  # log
        bf16_flops=362e12,  # ML, TT
        fp16_flops=362e12,  # ML
        matmul_flops=None,
        hbm_bytes_per_s=0.86e12,  # ML
        link_bytes_per_s=_PCIE4,
        host_bytes_per_s=_PCIE4,
        network_bytes_per_s=None,
        fp32_flops=91.6e12,  # DS
    ),
    GPU(
        name="L4",
        device_names=("NVIDIA L4",),
        memory_bytes=_gib(22.03),  # log
        bf16_flops=121e12,  # NC
        fp16_flops=121e12,  # as bf16, the same tensor cores
        matmul_flops=None,
        hbm_bytes_per_s=0.3e12,  # 192 bits at 12.5 Gb/s
        link_bytes_per_s=_PCIE4,
        host_bytes_per_s=_PCIE4,
        network_bytes_per_s=None,
        fp32_flops=30.3e12,  # DS
    ),
    GPU(
        name="A6000",
        device_names=("NVIDIA RTX A6000", "RTX A6000"),
        memory_bytes=None,
        bf16_flops=154.85e12,  # TT
        fp16_flops=154.85e12,  # as bf16, the same tensor cores
        matmul_flops=None,
        hbm_bytes_per_s=0.768e12,  # 384 bits at 16 Gb/s
        link_bytes_per_s=_PCIE4,  # without the bridge that joins pairs
        host_bytes_per_s=_PCIE4,
        network_bytes_per_s=None,
        fp32_flops=38.7e12,  # DS
    ),
    GPU(
        name="5090",
        device_names=("NVIDIA GeForce RTX 5090",),
        memory_bytes=_gib(31.36),  # log
        bf16_flops=209.5e12,  # NC; fp32 accumulation, as on all GeForce cards
        fp16_flops=209.5e12,  # as bf16, the same tensor cores
        matmul_flops=None,
        hbm_bytes_per_s=1.792e12,  # 512 bits at 28 Gb/s
        link_bytes_per_s=_PCIE5,
        host_bytes_per_s=_PCIE5,
        network_bytes_per_s=None,
        fp32_flops=104.8e12,  # DS
    ),
    GPU(
        name="4090",
        device_names=("NVIDIA GeForce RTX 4090",),
        memory_bytes=_gib(23.64),  # log: 3DTopia/Phidias-Diffusion#8
        bf16_flops=165.2e12,  # NC
        fp16_flops=165.2e12,  # as bf16, the same tensor cores
        matmul_flops=None,
        hbm_bytes_per_s=1.008e12,  # 384 bits at 21 Gb/s
        link_bytes_per_s=_PCIE4,
        host_bytes_per_s=_PCIE4,
        network_bytes_per_s=None,
        fp32_flops=82.6e12,  # DS
    ),
    GPU(
        name="3090",
        device_names=("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
        memory_bytes=_gib(23.69),  # log: Lightning-AI/lit-llama#137
        bf16_flops=71e12,  # NC; the often quoted 142 accumulates in fp16
        fp16_flops=71e12,  # as bf16, the same tensor cores
        matmul_flops=None,
        hbm_bytes_per_s=0.936e12,  # 384 bits at 19.5 Gb/s
        link_bytes_per_s=_PCIE4,  # without the bridge that joins pairs
        host_bytes_per_s=_PCIE4,
        network_bytes_per_s=None,
        fp32_flops=35.6e12,  # DS
    ),
    GPU(
        name="V100-32GB",
        device_names=("Tesla V100-SXM2-32GB",),
        memory_bytes=_gib(31.74),  # log
        bf16_flops=None,
        fp16_flops=125e12,  # LA
        matmul_flops=None,
        hbm_bytes_per_s=0.9e12,  # LA
        link_bytes_per_s=150e9,  # ML: NVLink 2
        host_bytes_per_s=_PCIE3,
        network_bytes_per_s=None,
        fp32_flops=15.7e12,  # DS
    ),
    GPU(
        name="V100-16GB",
        device_names=("Tesla V100-SXM2-16GB",),
        memory_bytes=None,
        bf16_flops=None,
        fp16_flops=125e12,  # LA
        matmul_flops=None,
        hbm_bytes_per_s=0.9e12,  # LA
        link_bytes_per_s=150e9,  # ML: NVLink 2
        host_bytes_per_s=_PCIE3,
        network_bytes_per_s=None,
        fp32_flops=15.7e12,  # DS
    ),
    GPU(
        name="T4",
        device_names=("Tesla T4",),
        memory_bytes=_gib(14.56),  # log; with ECC off up to 14.76
        bf16_flops=None,
        fp16_flops=65e12,  # vendor's data sheet
        matmul_flops=None,
        hbm_bytes_per_s=0.32e12,  # 256 bits at 10 Gb/s
        link_bytes_per_s=_PCIE3,
        host_bytes_per_s=_PCIE3,
        network_bytes_per_s=None,
        fp32_flops=8.1e12,  # DS
    ),
    GPU(
        name="B200",
        device_names=("NVIDIA B200",),
        memory_bytes=_gib(178.35),  # log
        bf16_flops=2250e12,  # ML, TT
        fp16_flops=2250e12,  # ML
        matmul_flops=1745e12,  # ML
        hbm_bytes_per_s=8.0e12,  # ML
        link_bytes_per_s=900e9,  # ML: NVLink 5
        host_bytes_per_s=_PCIE5,
        network_bytes_per_s=50e9,  # ML: AWS P6-B200, eight 400 Gb/s NICs
    ),
    GPU(
        name="GB200",
        device_names=("NVIDIA GB200",),
        memory_bytes=_gib(184.3),  # torchtitan docs/nvfp4.md
        bf16_flops=2500e12,  # ML, TT
        fp16_flops=2500e12,  # ML
        matmul_flops=1822e12,  # ML
        hbm_bytes_per_s=8.0e12,  # ML
        link_bytes_per_s=900e9,  # ML: NVLink 5
        host_bytes_per_s=None,
        network_bytes_per_s=None,
    ),
    GPU(
        name="MI300X",
        device_names=("AMD Instinct MI300X",),
        memory_bytes=_gib(191.98),  # log: ROCm/TransformerEngine#79
        bf16_flops=1307e12,  # ML
        fp16_flops=1307e12,  # ML
        matmul_flops=668.4e12,  # ML: torch 2.5, ROCm 6.3
        hbm_bytes_per_s=5.3e12,  # ML
        link_bytes_per_s=448e9,  # ML: xGMI, 64 GB/s to each of seven peers
        host_bytes_per_s=_PCIE5,
        network_bytes_per_s=None,
        fp32_flops=163.4e12,  # DS
    ),
)
"""The GPUs known here."""


def find_gpu(name: str) -> GPU:
    """The GPU called `name` in `--gpus`; case, blanks, dashes and a leading "RTX" do not matter.

    Raises UserError with the nearest names where there is none: "A100" alone could be three cards.
    """
    wanted = _plain(name)
    for gpu in GPUS:
        if _plain(gpu.name) == wanted:
            return gpu
    raise UserError(
        f"`--gpus` must name a GPU of the table, but names {_short(name)}; did you mean {_nearest(name)}? "
        "`--hardware FILE.json` takes a card that the table lacks"
    )


CALIBRATION = "calibration"
"""The key under which a `--hardware` file says where its rates come from."""


def load_hardware(path: Path | str, *, option: str = "--hardware") -> GPU:
    """The GPU that a JSON file describes, an object with the fields of `GPU`: `--hardware FILE.json`.

    Only `name` must be there; what is missing is not known, hence None. An object "calibration", in which
    `scaling.calibrate` says how it measured, is not looked into. Raises UserError, in which the file is that of
    `option`, where it cannot be read, for an unknown key (naming the nearest known one) and for a value that no such
    field can have.
    """
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a JSON or UTF-8 error is a ValueError
        raise UserError(
            f"`{option}` must name a JSON file, but {_short(str(path))} cannot be read as one: {error}; correct it"
        ) from None
    if not isinstance(found, dict):
        raise UserError(
            f"`{option}` must hold a JSON object, but {_short(str(path))} holds {type(found).__name__}; "
            'write {"name": ..., "bf16_flops": ..., ...}'
        )
    values = cast("dict[str, Any]", found)
    problems = list(_hardware_problems(values, option))
    if problems:
        raise UserError("\n".join(problems))
    arguments: dict[str, Any] = {one.name: None for one in fields(GPU) if one.default is MISSING}
    arguments |= {key: value for key, value in values.items() if key != CALIBRATION}
    arguments["device_names"] = tuple(values.get("device_names", ()))
    arguments["measured"] = Measured(**cast("dict[str, Any]", values.get("measured") or {}))
    return GPU(**arguments)


def gemm_ceiling(path: Path | str, precision: Literal["bf16", "fp16", "fp32"], device: str) -> float | None:
    """FLOP/s of the fastest matrix product that `scaling.calibrate` measured at `precision`: of `profile.hardware`.

    `device`: what the run is on, torch.cuda.get_device_name or "cpu". None where the file holds no such measurement.
    Raises UserError where it cannot be read, or was measured on another device.
    """
    measured = load_hardware(path, option="profile.hardware").measured
    found = measured.matmul_flops(precision)
    of = "cpu" if measured.device_type == "cpu" else measured.device
    if found is not None and of is not None and of != device:
        raise UserError(
            f"`profile.hardware` must be measured on what the run is on, {_short(device)}, but {_short(str(path))} is "
            f"of {_short(of)}; measure this machine: python -m scaling.calibrate --out FILE"
        )
    return found


def _hardware_problems(values: dict[str, Any], option: str) -> Iterator[str]:
    """What is wrong with the fields of the file of `option`, a message each."""
    known = [*(one.name for one in fields(GPU)), CALIBRATION]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            yield f"`{option}` must have keys of the GPU table only, but has {_short(key)}; did you mean {near!r}?"
        elif key in ("measured", CALIBRATION):
            if value is not None and not isinstance(value, dict):
                yield f"`{key}` must be an object or null, but is {_short(str(value))}; correct it or drop it"
            elif key == "measured":
                yield from _measured_problems(cast("dict[str, Any]", value or {}))
        elif key == "name":
            if not isinstance(value, str) or not value:
                yield f"`name` must be a text, but is {_short(str(value))}; give the card a name"
        elif key == "device_names":
            names = cast("list[Any]", value) if isinstance(value, list) else [None]
            if not all(isinstance(name, str) for name in names):
                given = _short(str(values[key]))
                yield f"`device_names` must be a list of texts, but is {given}; correct it or drop it"
        elif value is not None and not _is_rate(value):
            yield f"`{key}` must be a positive number or null, but is {_short(str(value))}; correct it or drop it"
    if "name" not in values:
        yield f"`name` must be in a `{option}` file, but is absent; give the card a name"
    size = values.get("memory_bytes")
    if isinstance(size, float) and _is_rate(size) and not size.is_integer():
        yield f"`memory_bytes` must be a whole number, but is {size}; give bytes, not GiB"


def _measured_problems(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with what a `--hardware` file calls measured."""
    known = [one.name for one in fields(Measured)]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            yield f"`measured` must have keys that calibrate writes only, but has {_short(key)}; did you mean {near!r}?"
        elif value is None:
            continue
        elif key == "device_type":
            if value not in ("cuda", "cpu"):
                yield f'`measured.device_type` must be "cuda" or "cpu", but is {_short(str(value))}; correct it'
        elif key == "device":
            if not isinstance(value, str):
                yield f"`measured.device` must be a text, but is {_short(str(value))}; correct it or drop it"
        elif not _is_rate(value):
            given = _short(str(value))
            yield f"`measured.{key}` must be a positive number or null, but is {given}; correct it or drop it"


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def gpu_from_device_name(torch_name: str) -> GPU | None:
    """The GPU that torch.cuda.get_device_name or nvidia-smi call `torch_name`; None for any other name.

    The whole name must match: "NVIDIA H200 NVL" is no H200, and a MIG slice of an A100 is no A100.
    """
    wanted = " ".join(torch_name.split()).casefold()
    return next((gpu for gpu in GPUS if wanted in (known.casefold() for known in gpu.device_names)), None)


def parse_gpus(text: str) -> Cluster:
    """`text`, written as [NODESx]COUNTxNAME ("8xH100-80GB", "4x8xA100-40GB"), as a cluster; UserError otherwise."""
    # Nine digits are more GPUs than exist; without a bound a long number would be a slow mistake.
    found = re.fullmatch(r"(?:([0-9]{1,9})[xX])?([0-9]{1,9})[xX](.+)", text.strip(), flags=re.DOTALL)
    if found is None:
        raise UserError(
            "`--gpus` must be [NODESx]COUNTxNAME such as 8xH100-80GB, "
            f"but is {_short(text)}; did you mean {_repaired(text)}?"
        )
    nodes, count = int(found[1] or 1), int(found[2])
    if nodes < 1 or count < 1:
        raise UserError(
            "`--gpus` must be [NODESx]COUNTxNAME with counts of at least 1, "
            f"but is {_short(text)}; use {max(1, nodes)}x{max(1, count)}x{found[3]}"
        )
    return Cluster(nodes, count, find_gpu(found[3]))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold().removeprefix("nvidia").removeprefix("geforce").removeprefix("rtx")


def _nearest(name: str) -> str:
    """Up to three names of the table like `name`, those that it begins first; all names where none is alike."""
    wanted = _plain(name)[:64]

    def likeness(gpu: GPU) -> float:
        family = _plain(gpu.name.split("-")[0])  # "H101" is nearer to the family H100 than to any whole name
        if wanted and (_plain(gpu.name).startswith(wanted) or wanted.startswith(family)):
            return 1.0
        return max(difflib.SequenceMatcher(None, wanted, known).ratio() for known in (family, _plain(gpu.name)))

    close = sorted((gpu for gpu in GPUS if likeness(gpu) >= 0.6), key=likeness, reverse=True)  # ties: the table's order
    return " or ".join(gpu.name for gpu in close[:3]) or ", ".join(gpu.name for gpu in GPUS)


def _repaired(text: str) -> str:
    """What `text` may have meant: "8*H200", "8 x H200" and "8H200" are all 8xH200."""
    found = re.match(r"\s*-?([0-9]{1,4})\s*(?:[xX*: ]\s*-?(?:([0-9]{1,4})\s*[xX*: ]\s*)?|(?=[A-Za-z]))(.+)", text[:100])
    counts = [max(1, int(number)) for number in found.groups()[:2] if number] if found else [1]
    name = _nearest(found[3] if found else text).split(" or ")[0].split(", ")[0]
    return "x".join([*(str(count) for count in counts), name])


def _short(text: str) -> str:
    """`text` quoted for a message, cut where it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
