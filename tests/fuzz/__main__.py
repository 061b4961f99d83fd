"""Random cases against the naive twins, for as long as you like: ``make fuzz``.

    python tests/fuzz --minutes 5 --seed 1
    python tests/fuzz --engine            # whole engines: a request in many circumstances

Every case follows from the seed that is printed.  One that fails is made smaller and printed as a
test for tests/fuzz/test_found.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core
sys.path[:0] = [str(ROOT / part) for part in ("", "tests", "benchmarks", "examples/demo")]

from fuzz import families  # noqa: E402  the paths above


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=families.FAMILIES, action="append")
    parser.add_argument("--engine", action="store_true", help="metamorphic checks on engines")
    parser.add_argument("--out", type=Path, help="write what was done here, as JSON")
    args = parser.parse_args()
    if args.engine:
        from fuzz import metamorphic

        return metamorphic.main(args.minutes, args.seed)
    names = args.only or list(families.FAMILIES)
    print(f"seed {args.seed}, {args.minutes:g} minutes, {args.processes} processes: {names}")
    context = multiprocessing.get_context("spawn")
    end = time.time() + 60 * args.minutes
    jobs = [(args.seed, nth, args.processes, names, end) for nth in range(args.processes)]
    began = time.time()
    with context.Pool(args.processes) as pool:
        results = pool.starmap(families.work, jobs)
    done: dict[str, Counter] = {name: Counter() for name in names}
    for counts, _ in results:
        for name in names:
            done[name] += counts[name]
    failures = [failure for _, found in results for failure in found]
    for name, counts in done.items():
        print(
            f"{name:10} {counts['cases']:8,} cases, {counts['steps']:9,} steps, "
            f"{counts['sets']:11,} sets, {counts['ties']} ties, {counts['failed']} failed"
        )
    seconds = time.time() - began
    steps = sum(counts["steps"] for counts in done.values())
    print(f"{steps:,} steps in {seconds:.0f} s, {len(failures)} failures")
    for failure in failures:
        print("\n" + failure)
    if args.out:
        report = {"seed": args.seed, "seconds": seconds, "failures": failures}
        args.out.write_text(json.dumps(report | {"families": done}, indent=1) + "\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
