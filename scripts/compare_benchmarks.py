# SPDX-License-Identifier: Apache-2.0
"""Compare two benchmark runs: how the speedup of each op over its baselines has changed.

    python scripts/compare_benchmarks.py EARLIER NOW [--tolerance 0.15]

Each file is the JSON that pytest-benchmark writes for benchmarks/, or the benchmarks.json of scripts/gpu.py. The script
compares the ratio of a baseline's time to ours. Both are measured alternately in one run, which makes the ratio more
stable than single times. A ratio that fell by more than the tolerance, or a comparison that is missing, is a fault. The
exit status is 1 if there is a fault, 2 if a file cannot be read, and 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

Ratios = dict[tuple[str, str], float]  # (comparison, baseline) -> the baseline's time over ours


def ratios(file: Path) -> Ratios:
    """Read the ratios in a file. Raises ValueError if it contains no comparisons."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a file of benchmark results")
    if "benchmarks" in content:
        infos = [b["extra_info"] for b in content["benchmarks"]]
        comparisons = {info["group"]: info["comparison"] for info in infos if "comparison" in info}
    else:
        comparisons = content.get("comparisons", {})
    found = {
        (group, row["name"]): row["ratio"]
        for group, rows in comparisons.items()
        for row in rows
        if row["ratio"] is not None
    }
    if not found:
        raise ValueError(f"{file}: contains no comparisons")
    return found


def compare(earlier: Ratios, now: Ratios, tolerance: float) -> tuple[list[str], int]:
    """Return the lines of a Markdown table, and the number of faults."""
    lines = ["| comparison | baseline | earlier | now | change | |", "|---|---|---|---|---|---|"]
    faults = 0
    for key in dict.fromkeys([*earlier, *now]):
        before, after = earlier.get(key), now.get(key)
        if before is None or after is None:
            verdict, change = ("new" if before is None else "**gone**"), ""
        else:
            change = f"{after / before - 1:+.0%}"
            slower, faster = after < before * (1 - tolerance), after > before * (1 + tolerance)
            verdict = "**slower**" if slower else "faster" if faster else ""
        faults += verdict.startswith("**")
        cells = (*key, _times(before), _times(after), change, verdict)
        lines.append("| " + " | ".join(cells) + " |")
    return lines, faults


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("now", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15, help="accepted drop of a ratio (default %(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.tolerance < 1:
        parser.error(f"--tolerance must be at least 0 and below 1; got {options.tolerance}")
    try:
        earlier, now = ratios(options.earlier), ratios(options.now)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"compare_benchmarks: {error}", file=sys.stderr)
        return 2
    lines, faults = compare(earlier, now, options.tolerance)
    print("\n".join(lines))
    print(f"\n{len(lines) - 2} ratios; {faults} slower by more than {options.tolerance:.0%}, or gone")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
