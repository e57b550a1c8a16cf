"""Attack the package and print what was tried and what broke: `python tests/attack.py`.

Not part of the test suite. Everything is made from a seed; at most 15 minutes on two cores. Nothing may break: no code
runs that was not asked for, no traceback, no hang, no exit code but 0, 1, 2 and 130, no answer lost, no wrong cache.

    python tests/attack.py --families caches resume     some families
    python tests/attack.py --only options:17            one case, with all that it wrote
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # cases are processes, forked without threads
sys.path[0] = str(Path(__file__).parents[1])

from tests.attack import caches, calls, checkpoints, configs, kills, options, resume, stranger  # noqa: E402
from tests.attack.harness import Harness  # noqa: E402

FAMILIES = {
    "configs": configs.cases,
    "checkpoints": checkpoints.cases,
    "caches": caches.cases,
    "resume": resume.cases,
    "options": options.cases,
    "calls": calls.cases,
    "kills": kills.cases,
    "stranger": stranger.cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument("--only", help="FAMILY:NUMBER, one case")
    args = parser.parse_args()
    harness = Harness(args.workers)
    names = [args.only.partition(":")[0]] if args.only else args.families
    for name in names:
        cases = list(FAMILIES[name](args.seed))
        if args.only:
            harness.show(cases[int(args.only.partition(":")[2])])
            return
        harness.run(name, cases)
    raise SystemExit(harness.report())


if __name__ == "__main__":
    main()
