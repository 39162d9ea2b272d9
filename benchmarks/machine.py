# SPDX-License-Identifier: Apache-2.0
"""What ran the benchmarks: a time means nothing without its processor."""

import os
import platform
import re
from pathlib import Path


def processor(cpuinfo: str | None = None) -> str:
    """Name of this machine's processor, from the text of /proc/cpuinfo or what else the system says."""
    if cpuinfo is None:
        file = Path("/proc/cpuinfo")
        cpuinfo = file.read_text(errors="replace") if file.exists() else ""
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.M)
    return " ".join(name[1].split()) if name else platform.processor() or platform.machine()


def title(harness):
    """Processor or card, torch, and for a CPU how busy it is: one or two lines."""
    import torch

    from dlmkernels import _C

    if (floors := harness.floors) is not None:
        yield (
            f"{torch.cuda.get_device_name()}; torch {torch.__version__}; floors: copy "
            f"{floors.bytes_a_second() / 1e9:,.0f} GB/s, bf16 product {floors.flops_a_second / 1e12:,.0f} TFLOP/s"
        )
        return
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    yield (
        f"{processor()}, kernels: {_C.cpu_isa()}; torch {torch.__version__}, {threads} threads "
        f"on {os.cpu_count()} processors, load {load:.1f}"
    )
    if load > threads + 1:
        yield "other programs were running: compare the rows of a group, trust no single time"
