"""Every benchmark, one after the other: `make bench`. Exits 1 when a target is missed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = ("lossless.py", "backend.py", "scaling.py", "aa.py")


def main() -> None:
    """Run all and say which missed their target."""
    missed = []
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, str(HERE / name)]).returncode:
            missed.append(name)
    print("all targets met" if not missed else f"targets missed: {', '.join(missed)}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
