"""Run all benchmarks: measure the speed cases now, and print the tables of the longer ones from their recorded runs.

python -m benchmarks            # about ten minutes
python -m benchmarks --all      # makes every missing run first, which takes about a day; it can be stopped and resumed
"""

from __future__ import annotations

import argparse
import subprocess
import sys

RUNS = ("small_beats_large", "exactness", "halting", "claims", "tasks", "retrofit")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="make every missing run")
    everything = parser.parse_args().all
    failed = []
    for name in ("speed", "published", *(["growth"] if everything else []), *RUNS):
        print(f"\n## {name}\n", flush=True)
        arguments = ["--report"] if name in RUNS and not everything else []
        failed += [name] * bool(subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments]).returncode)
    print("\nEvery line passes." if not failed else f"\nNot all reached, see above and LOG.md: {', '.join(failed)}.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
