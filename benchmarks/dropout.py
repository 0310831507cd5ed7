"""What dropout costs: a training step with hidden dropout, and with attention dropout too, against one without.

    python benchmarks/dropout.py [--rounds 5] [the shapes of train.py: --num-layers 6 --device cuda ...]

megalith hashes a mask for each element, on whichever rank it lies, so that every layout draws the same one;
transformers draws from a stream. Both run in turn, each in a separate process. The time of a step without dropout is 1.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys

import train

CANDIDATES = ("megalith", "megalith-compile", "hf", "hf-compile")
KINDS = {"none": ("0", "0"), "hidden 0.1": ("0.1", "0"), "hidden and attention 0.1": ("0.1", "0.1")}


def main() -> None:
    """Run everything in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=3)
    args, shapes = parser.parse_known_args()
    rates: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in args.candidates for kind in KINDS}
    for _ in range(args.rounds):
        for (name, kind), found in rates.items():
            hidden, attention = KINDS[kind]
            result = train.apart(name, [*shapes, "--hidden-dropout", hidden, "--attention-dropout", attention])
            if isinstance(result, str):
                sys.exit(f"{name}, {kind}: failed\n{result}")
            found.append(result["tokens_per_second"])
    print(f"machine: {platform.machine()}, {platform.platform()}, Python {platform.python_version()}")
    print(f"command: python benchmarks/dropout.py {' '.join(sys.argv[1:])}")
    print(f"{'':18} {'dropout':26} {'tokens/s':>9} {'min':>8} {'max':>8}  time of a step over the one without")
    for (name, kind), found in rates.items():
        cost = statistics.median(rates[name, "none"]) / statistics.median(found)
        print(f"{name:18} {kind:26} {statistics.median(found):9.0f} {min(found):8.0f} {max(found):8.0f}  {cost:.3f}")


if __name__ == "__main__":
    main()
