"""Peak speed of devices, and how much of it a run uses.

MFU is model FLOPs utilization (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import re

# Words of the device's name -> dense TFLOP/s in (bfloat16, or float16 where there is no bfloat16; float32 without
# TF32), from the vendors' data sheets. Without sparsity: some data sheets print twice these numbers. Where several
# names match, the one with more words is used.
_PEAKS = {
    "B200": (2250.0, 75.0),
    "GB200": (2500.0, 80.0),
    "H200": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "H100": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H800": (989.0, 67.0),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI300X": (1307.0, 163.4),
    "MI325X": (1307.0, 163.4),
    "MI250X": (191.5, 23.9),  # one of its two dies is a device
    "GPU Max 1550": (419.0, 26.2),  # one of its two stacks is a device, unless ZE_FLAT_DEVICE_HIERARCHY=COMPOSITE
}


def peak_flops(device_name: str, compute_dtype: str = "bfloat16", peak_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of one device by the name that the driver gives.

    None for a CPU, a part of a device (MIG), or an unknown name. compute_dtype: bfloat16, float16 or float32.
    peak_tflops: the value of `--peak-tflops`, which is used instead of the table.
    """
    if peak_tflops:
        return peak_tflops * 1e12
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    found = [name for name in _PEAKS if set(name.upper().split()) <= words]
    if not found or "MIG" in words:
        return None
    half, single = _PEAKS[max(found, key=lambda name: len(name.split()))]
    return (single if compute_dtype == "float32" else half) * 1e12


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, world_size: int = 1) -> float | None:
    """Model FLOPs utilization, 0 to 1, or None where `peak` (FLOP/s of one device) is unknown.

    tokens_per_second: of all devices together. flops_per_token: of forward and backward, recomputation not counted. It
    comes in two conventions, attention in full (PaLM, torchtitan) or at its causal half (Megatron): 12 % apart for
    Llama-3-8B at sequence 8192, so that a printed value should name its convention.
    """
    return tokens_per_second * flops_per_token / (peak * world_size) if peak else None
