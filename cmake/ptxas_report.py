# SPDX-License-Identifier: Apache-2.0
"""Run nvcc, and store ptxas's report of registers and spills (-Xptxas=-v) next to the object file, as OBJECT.ptxas.

`tests/native/test_nvcc.py` reads it. Output that is not about the resources of a kernel, such as warnings, is still
printed.
"""

import re
import subprocess
import sys
from pathlib import Path

OF_RESOURCES = re.compile(r"ptxas info +:|^ +\d+ bytes (stack frame|smem|cmem)")


def main(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines(keepends=True)
    sys.stderr.writelines(line for line in lines if not OF_RESOURCES.search(line))
    if "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(lines), encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
