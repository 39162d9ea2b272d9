# SPDX-License-Identifier: Apache-2.0
"""Print the requirements of the build and of an extra in pyproject.toml: `python scripts/requirements.py dev`.

pip can install an extra only together with the package. The Makefile installs the requirements first, so that editing a
source file only rebuilds the package. This script parses the few TOML lines it needs itself, because Python 3.10 has no
tomllib.
"""

import ast
import re
import sys
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")


def entry(name: str) -> list[str]:
    """Return the list of strings in `name = [...]`."""
    match = re.search(rf"^{name} = (\[.*?\])$", TEXT, re.M | re.S)
    if match is None:
        sys.exit(f"pyproject.toml has no list named {name}")
    return ast.literal_eval(match.group(1))


def resolve(name: str) -> list[str]:
    """Return the list `name` with references to the package's own extras resolved."""
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
