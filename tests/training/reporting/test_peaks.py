"""Peaks by the names drivers give, and MFU against a published run."""

import pytest

from megalith.training.reporting.peaks import mfu, peak_flops


@pytest.mark.parametrize(
    "name, bf16, fp32",
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H20", 148, 44),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("Tesla V100-SXM2-16GB", 125, 15.7),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("AMD Instinct MI300X", 1307, 163.4),
        ("Intel(R) Data Center GPU Max 1550", 419, 26.2),
    ],
)
def test_by_device_name(name, bf16, fp32):
    assert peak_flops(name) == peak_flops(name, "float16") == bf16 * 1e12
    assert peak_flops(name, "float32") == fp32 * 1e12


@pytest.mark.parametrize("name", ["cpu", "Intel(R) Xeon(R)", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 2060", ""])
def test_unknown_devices_and_parts_of_devices_have_none(name):
    assert peak_flops(name) is None


def test_the_flag_wins():
    assert peak_flops("cpu", peak_tflops=1.5) == peak_flops("NVIDIA H100 80GB HBM3", peak_tflops=1.5) == 1.5e12


def test_both_conventions_of_llama_3_8b_at_sequence_8192():
    """6 x 7.5e9 parameters outside the embedding = 45.0 GFLOP a token; attention adds 12.9 in full or half of that."""
    full, half = 45.0e9 + 12.9e9, 45.0e9 + 12.9e9 / 2
    h100 = peak_flops("NVIDIA H100 80GB HBM3")
    assert mfu(6667, full, h100) == pytest.approx(0.390, abs=0.001)  # torchtitan's table, attention in full
    assert mfu(14451, half, h100) * 989 == pytest.approx(744, abs=1)  # Megatron-Bridge's TFLOP/s, attention at half
    assert full / half == pytest.approx(1.125, abs=0.001)


def test_tokens_are_of_all_devices_and_the_peak_of_one():
    assert mfu(8000.0, 1e9, 1e13, world_size=8) == pytest.approx(0.1)


def test_no_peak_no_mfu():
    assert mfu(8000.0, 1e9, None) is None
