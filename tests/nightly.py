"""Ten thousand draws of what holds for every inner loop (`properties.py`), in one process, and a record of them.

    python tests/nightly.py --draws 10000 --out results/properties-cpu.json

A case that fails is shrunk, printed and recorded; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from kvbind.bench.harness.record import provenance, save
from properties import PROPERTIES, cases


def draw(draws: int, start: int) -> dict[str, object]:
    """Draw so many cases, as many for each property; one failure of each, the smallest found, is recorded."""
    failures: list[dict[str, str]] = []
    counts: Counter[str] = Counter()

    def counted(name):
        def check(case):
            counts[name] += 1
            PROPERTIES[name](case)

        return check

    each = -(-draws // len(PROPERTIES))
    for name in PROPERTIES:
        options = settings(
            max_examples=each, deadline=None, database=None, print_blob=False, report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        try:
            options(seed(start)(given(cases())(counted(name))))()
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            failures.append({"property": name, "error": f"{type(error).__name__}: {error}", "case": notes})
            print(failures[-1])
    return {"draws": draws, "seed": start, "checks": dict(counts), "failures": failures}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10000, help="cases of all properties")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--out", type=Path, help="where to write the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    about = provenance(torch.device("cpu"), ("hypothesis",))
    record = about | draw(options.draws, options.seed)
    record["seconds"] = round(time.perf_counter() - begin)
    save(options.out, record)
    print(f"hypothesis {hypothesis.__version__}: {record['checks']}, {len(record['failures'])} failures")
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
