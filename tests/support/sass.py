# SPDX-License-Identifier: Apache-2.0
"""Machine code of CUDA kernels: how many instructions a pass through a loop takes, from what nvdisasm prints."""

import heapq
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from simt_programs import ROOT, needs_nvcc


def disassemble(source: Path, arch: str, folder: Path) -> str:
    """The machine code of a CUDA source for an architecture; skips where nvcc or nvdisasm is missing."""
    needs_nvcc()
    program = nvdisasm()
    if program is None:
        pytest.skip("nvdisasm is neither on PATH nor installed (pip install nvidia-cuda-nvdisasm)")
    cubin = folder / "kernels.cubin"
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(cubin)]
    subprocess.run(["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *target, str(source)], check=True)
    return subprocess.run([program, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout


def nvdisasm() -> str | None:
    try:
        import nvidia
    except ImportError:
        return shutil.which("nvdisasm")
    found = (path for folder in nvidia.__path__ for path in Path(folder).glob("*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or next(map(str, found), None)


class Kernel:
    """A kernel as basic blocks: the instructions of each, and where it may go on."""

    def __init__(self, text: str):
        self.blocks: list[list[str]] = [[]]
        self.follows: list[list[str | int]] = [[]]  # labels, then numbers of blocks
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                self._end(falls_through=True)
                labels[label[1]] = len(self.blocks) - 1
            elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+ )?(?P<op>\S+)(?P<rest>.*?);", line):
                self.blocks[-1].append(code["op"])
                target = re.search(r"\.L_x_\d+", code["rest"])
                if code["op"].startswith("BRA") and target:
                    self.follows[-1].append(target[0])
                    # a branch may have its condition among its operands, too
                    self._end(falls_through=bool(code["guard"] or re.search(r"\bU?P\d", code["rest"])))
                elif code["op"].startswith(("EXIT", "RET")) and not code["guard"]:
                    self._end(falls_through=False)
        self.follows = [[labels[to] if isinstance(to, str) else to for to in ends] for ends in self.follows]

    def _end(self, falls_through: bool) -> None:
        if falls_through:
            self.follows[-1].append(len(self.blocks))
        self.blocks.append([])
        self.follows.append([])

    def shortest_pass(self, op: str, count: int) -> int | None:
        """Fewest instructions of a way through some loop that meets just `count` instructions beginning with `op`."""
        weight = [sum(code.startswith(op) for code in block) for block in self.blocks]
        best = None
        for start in (i for i, n in enumerate(weight) if n):
            reached: dict[tuple[int, int], int] = {}
            queue = [(0, start, 0)]
            while queue:
                length, block, met = heapq.heappop(queue)
                if block == start and met == count:
                    best = length if best is None else min(best, length)
                    break
                if (block, met) in reached or (best is not None and length >= best):
                    continue
                reached[block, met] = length
                met += weight[block]
                if met <= count:
                    for follower in self.follows[block]:
                        heapq.heappush(queue, (length + len(self.blocks[block]), follower, met))
        return best


def kernels(text: str) -> dict[str, Kernel]:
    """Kernels by their readable names."""
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.M)
    names = subprocess.run(
        ["c++filt"], input="\n".join(parts[1::2]), capture_output=True, text=True
    ).stdout.splitlines()
    plain = (re.sub(r"\(dlm::cuda::AttendForm\)", "", name) for name in names)
    return {re.sub(r"\(.*|^void |dlm::(cuda::)?", "", name): Kernel(body) for name, body in zip(plain, parts[2::2])}
