# SPDX-License-Identifier: Apache-2.0
"""Print what an extra of pyproject.toml asks for, with what the build needs: `python scripts/requirements.py dev`.

pip can install an extra only together with the package; the Makefile installs the tools first, so that an edited
source rebuilds the package and nothing else. Reads the few TOML lines it needs by itself: Python 3.10 has no tomllib.
"""

import ast
import re
import sys
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")


def entry(name: str) -> list[str]:
    """The list of strings that `name = [...]` holds."""
    match = re.search(rf"^{name} = (\[.*?\])$", TEXT, re.M | re.S)
    if match is None:
        sys.exit(f"pyproject.toml has no list called {name}")
    return ast.literal_eval(match.group(1))


def resolve(name: str) -> list[str]:
    """`entry`, with references to the package's own extras followed."""
    out: list[str] = []
    for item in entry(name):
        own = re.fullmatch(r"dlmkernels\[(.+)\]", item)
        out += [x for name in own.group(1).split(",") for x in resolve(name)] if own else [item]
    return out


if __name__ == "__main__":
    wanted = entry("requires") + [d for d in entry("dependencies") if not d.startswith("torch")]
    for extra in sys.argv[1:]:
        wanted += resolve(extra)
    print(" ".join(f"'{w}'" for w in dict.fromkeys(wanted)))
