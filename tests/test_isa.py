# SPDX-License-Identifier: Apache-2.0
"""The choice of a CPU instruction set, and that its instructions stay where they were asked for."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from dlmkernels import _C


def run(isa):
    code = "from dlmkernels import _C; print(_C.cpu_isa(), '|', _C.cpu_isa_reason())"
    environment = os.environ | {"DLMKERNELS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", "import torch; " + code], capture_output=True, text=True, env=environment
    )


def test_the_best_is_the_default():
    assert _C.cpu_isas()[0] == "generic"
    name, reason = run("").stdout.split(" | ")
    assert name == _C.cpu_isas()[-1] and reason.strip()


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_the_environment_chooses(isa):
    name, reason = run(isa).stdout.split(" | ")
    assert name == isa
    if isa != _C.cpu_isas()[-1]:
        assert reason.startswith("asked for; available: " + ", ".join(_C.cpu_isas()))


def test_an_unknown_name_says_what_there_is():
    out = run("mmx")
    assert out.returncode != 0
    assert "DLMKERNELS_CPU_ISA: CPU instruction set 'mmx' cannot be used; available: generic" in out.stderr
    with pytest.raises(ValueError, match="'mmx' cannot be used; available: generic"):
        _C.set_cpu_isa("mmx")
    assert _C.cpu_isa() in _C.cpu_isas()


# Mnemonics of VEX and EVEX instructions begin with v, those on mask registers are k...; a few others begin likewise.
WIDE = re.compile(
    r"\t(v(?!er[rw]\b|m(call|launch|resume|xo|run|load|save)\b)\w+|k(mov|and|or|xor|xnor|not|test|shift|unpck|add)\w*)\s"
)


def wide_functions():
    """Functions of the extension, by their demangled names -> the first instruction of theirs that needs AVX."""
    objdump = shutil.which("objdump")
    if not objdump:
        pytest.skip("no objdump")
    command = [objdump, "-d", "-C", "--no-show-raw-insn", _C.__file__]
    found, function = {}, "?"
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = header[1]
        elif (match := WIDE.search(line)) and function not in found:
            found[function] = match[1]
    return found


def test_wide_instructions_stay_in_their_namespaces():
    """The linker keeps one copy of an inline function: were it one compiled with wide instructions, every file would use
    it, on processors without them too.
    """
    found = wide_functions()
    assert not {name: what for name, what in found.items() if not re.search(r"\bdlm::cpu::avx512(bf16)?::", name)}
    if "avx512" in _C.cpu_isas():
        assert any("avx512::" in name and "scan_as<" in name for name in found)
