"""Numbers as people read them."""

from __future__ import annotations


def count(number: float) -> str:
    """1234567 -> '1.23 M' (thousands k, M, G, T, P)."""
    return _scaled(number, 1000.0, ("", " k", " M", " G", " T", " P"))


def size(number: float) -> str:
    """Bytes: 1536 -> '1.50 KiB'."""
    return _scaled(number, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'; under a minute with a decimal ('4.2 s')."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    total_seconds = int(seconds)
    return f"{total_seconds // 3600}:{total_seconds // 60 % 60:02}:{total_seconds % 60:02}"


def _scaled(number: float, base: float, suffixes: tuple[str, ...]) -> str:
    for suffix in suffixes[:-1]:
        if abs(number) < base:
            return f"{number:.0f}{suffix}" if suffix in ("", " B") else f"{number:.2f}{suffix}"
        number /= base
    return f"{number:.2f}{suffixes[-1]}"
