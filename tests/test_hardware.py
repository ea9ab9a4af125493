"""The GPU table: names are found, unknown ones never guessed, and the numbers are plausible."""

import json

import pytest

from scaling.errors import UserError
from scaling.hardware import GPUS, find_gpu, gemm_ceiling, gpu_from_device_name, parse_gpus


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("NVIDIA H100 NVL", "H100-NVL-94GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
    ],
)
def test_device_names(device: str, name: str) -> None:
    found = gpu_from_device_name(device)
    assert found is not None and found.name == name


@pytest.mark.parametrize(
    "device",
    [
        "",
        "cpu",
        "NVIDIA",
        "NVIDIA H100",
        "NVIDIA H200 NVL",
        "NVIDIA L40",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H300",
        "Tesla V100-PCIE-32GB",
    ],
)
def test_unknown_devices_are_none(device: str) -> None:
    assert gpu_from_device_name(device) is None


def test_names_are_distinct_and_found() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    devices = [device.casefold() for gpu in GPUS for device in gpu.device_names]
    assert len(set(devices)) == len(devices)
    for gpu in GPUS:
        assert find_gpu(gpu.name) is find_gpu(gpu.name.lower()) is gpu
        assert parse_gpus(f"2x8x{gpu.name}").gpu is gpu
    assert find_gpu("RTX 4090") is find_gpu("rtx-4090") is find_gpu("4090")


def test_known_numbers() -> None:
    h100, a100, v100, t4 = (find_gpu(name) for name in ("H100-80GB", "A100-80GB", "V100-32GB", "T4"))
    assert h100.peak_flops("bf16") == 989e12 and a100.peak_flops("bf16") == 312e12
    assert v100.peak_flops("bf16") is None and v100.peak_flops("fp16") == 125e12
    assert t4.peak_flops("bf16") is None and t4.peak_flops("fp16") == 65e12
    assert h100.peak_flops("fp32") is None
    assert h100.memory_bytes is not None and h100.memory_bytes / 2**30 == pytest.approx(79.11)
    assert find_gpu("A100-40GB").memory_bytes == 42298834944


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_plausible(gpu) -> None:  # slips of a factor of 1000, or of GB for GiB
    assert gpu.memory_bytes is None or 14 * 2**30 < gpu.memory_bytes < 300 * 2**30
    assert gpu.fp16_flops is not None and 60e12 <= gpu.fp16_flops < 3000e12
    assert gpu.bf16_flops in (None, gpu.fp16_flops)
    assert gpu.matmul_flops is None or 0.5 < gpu.matmul_flops / gpu.fp16_flops < 0.95
    assert gpu.hbm_bytes_per_s is None or 0.3e12 <= gpu.hbm_bytes_per_s <= 8e12
    assert gpu.link_bytes_per_s is None or 15e9 < gpu.link_bytes_per_s <= 900e9
    assert gpu.host_bytes_per_s is None or 15e9 < gpu.host_bytes_per_s < 64e9
    assert gpu.network_bytes_per_s is None or 6e9 < gpu.network_bytes_per_s <= 50e9


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name"),
    [
        ("8xH100-80GB", 1, 8, "8xH100-80GB"),
        ("2x8xH100-80GB", 2, 8, "2x8xH100-80GB"),
        ("4x8xA100-40GB", 4, 8, "4x8xA100-40GB"),
        ("1xH200", 1, 1, "1xH200"),
        ("1x8xH200", 1, 8, "8xH200"),
        (" 8Xh200 ", 1, 8, "8xH200"),
        ("8x4090", 1, 8, "8x4090"),
        ("2x8x4090", 2, 8, "2x8x4090"),
    ],
)
def test_clusters(text: str, nodes: int, per_node: int, name: str) -> None:
    cluster = parse_gpus(text)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.name) == (nodes, per_node, name)
    assert cluster.world_size == nodes * per_node
    assert parse_gpus(cluster.name) == cluster


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("H100-80GB", "[NODESx]COUNTxNAME such as 8xH100-80GB, but is 'H100-80GB'; did you mean 1xH100-80GB?"),
        ("8H100", "did you mean 8xH100-80GB?"),
        ("8*H200", "did you mean 8xH200?"),
        ("2 x 8 x H200", "did you mean 2x8xH200?"),
        ("-1xH200", "did you mean 1xH200?"),
        ("0xH200", "counts of at least 1, but is '0xH200'"),
        ("0x8xH200", "use 1x8xH200"),
        ("8x0xH200", "use 8x1xH200"),
        ("", "but is ''"),
        ("x", "but is 'x'"),
        ("8x", "but is '8x'"),
        ("1.5xH200", "but is '1.5xH200'"),
        ("9" * 5000 + "xH200", "999...'"),
        ("8xH101", "names 'H101'; did you mean H100"),
        ("8xA100", "did you mean A100-80GB or A100-PCIe-80GB or A100-40GB?"),
        ("8xFoo", "did you mean H100-80GB, "),
        ("8x" + "H" * 5000, "HHH...'"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_gpus(text)
    assert words in str(caught.value), str(caught.value)
    assert str(caught.value).startswith("`--gpus` must ") and len(str(caught.value)) < 700


H200 = {"device": "NVIDIA H200", "device_type": "cuda", "bf16_matmul_flops": 750e12, "fp32_matmul_flops": None}
CPU = {"device": "some processor", "device_type": "cpu", "bf16_matmul_flops": 1e11, "fp32_matmul_flops": 2e11}


def hardware(path, measured):
    path.write_text(json.dumps({"name": "any", "bf16_flops": 989e12, "matmul_flops": 794e12, "measured": measured}))
    return path


@pytest.mark.parametrize(
    ("measured", "precision", "device", "ceiling"),
    [
        (H200, "bf16", "NVIDIA H200", 750e12),
        (H200, "fp32", "NVIDIA H200", None),
        (H200, "fp16", "NVIDIA H200", None),
        (CPU, "bf16", "cpu", 1e11),
        (CPU, "fp32", "cpu", 2e11),
        (None, "bf16", "NVIDIA H200", None),
        ({"bf16_matmul_flops": 7e14}, "bf16", "NVIDIA H200", 7e14),
    ],
)
def test_the_ceiling_is_what_was_measured_and_nothing_else(tmp_path, measured, precision, device, ceiling):
    assert gemm_ceiling(hardware(tmp_path / "a.json", measured), precision, device) == ceiling


@pytest.mark.parametrize(
    ("measured", "device", "words"),
    [
        (H200, "NVIDIA H100 80GB HBM3", "is of 'NVIDIA H200'; measure this machine"),
        (H200, "cpu", "what the run is on, 'cpu', but"),
        (CPU, "NVIDIA H200", "is of 'cpu'"),
        ({**H200, "bf16_matmul_flop": 1}, "NVIDIA H200", "did you mean 'bf16_matmul_flops'?"),
        (5, "NVIDIA H200", "`measured` must be an object"),
    ],
)
def test_a_ceiling_of_another_device_is_refused(tmp_path, measured, device, words):
    with pytest.raises(UserError) as caught:
        gemm_ceiling(hardware(tmp_path / "a.json", measured), "bf16", device)
    assert words in str(caught.value) and "--hardware" not in str(caught.value)


def test_a_file_that_is_not_there_is_told_by_the_spec_field(tmp_path):
    with pytest.raises(UserError, match=r"^`profile\.hardware` must name a JSON file"):
        gemm_ceiling(tmp_path / "none.json", "bf16", "cpu")
