# SPDX-License-Identifier: Apache-2.0
"""The choice of a CPU instruction set, and that its instructions stay where they were asked for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlmkernels import _C, ops

CPU = Path(__file__).resolve().parents[2] / "csrc/cpu"
BEST = _C.cpu_isas()[-1]


def run(isa):
    code = "from dlmkernels import _C; print(_C.cpu_isa(), '|', _C.cpu_isa_reason())"
    environment = os.environ | {"DLMKERNELS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", "import torch; " + code], capture_output=True, text=True, env=environment
    )


def test_the_best_is_the_default():
    assert _C.cpu_isas()[0] == "generic"
    name, reason = run("").stdout.split(" | ")
    assert name == BEST
    assert bool(reason.strip()) == (BEST != "amx")  # why no better one


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_the_environment_chooses(isa):
    name, reason = run(isa).stdout.split(" | ")
    assert name == isa
    if isa != BEST:
        assert reason.startswith("requested; available: " + ", ".join(_C.cpu_isas()))


def test_an_unknown_name_says_what_there_is():
    out = run("mmx")
    assert out.returncode != 0
    assert "DLMKERNELS_CPU_ISA: CPU instruction set 'mmx' cannot be used; available: generic" in out.stderr
    assert "'mmx' cannot be used; available: generic" in refusal("mmx")
    assert _C.cpu_isa() in _C.cpu_isas()


def refusal(isa):
    with pytest.raises(ValueError) as refused:
        _C.set_cpu_isa(isa)
    return str(refused.value)


@pytest.mark.skipif("amx" in _C.cpu_isas(), reason="this machine has AMX")
def test_amx_is_refused_with_a_reason():
    assert re.search(r"'amx' cannot be used; available: generic.*; amx: .*(lacks|support|build)", refusal("amx"))


@pytest.mark.skipif("avx2" not in _C.cpu_isas(), reason="no AVX2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_avx2_gives_the_bits_of_the_generic_code(dtype):
    logits = (3 * torch.randn(5, 20011)).to(dtype)
    draws = {name: torch.arange(5, dtype=kind) for name, kind in
             [("seed", torch.int64), ("position", torch.int32), ("step", torch.int32)]}  # fmt: skip

    def run(isa):
        before = _C.cpu_isa()
        _C.set_cpu_isa(isa)
        try:
            return ops.token_confidence(
                logits, temperature=torch.tensor([0.8]), top_p=torch.tensor([0.9]), with_margin=True,
                with_entropy=True, **draws,
            )  # fmt: skip
        finally:
            _C.set_cpu_isa(before)

    generic, avx2 = run("generic"), run("avx2")
    assert len(generic) == len(avx2)
    assert all(torch.equal(a, b) for a, b in zip(generic, avx2))


# Mnemonics of VEX and EVEX instructions begin with v, those on mask registers are k...; a few others begin likewise.
WIDE = re.compile(
    r"\t(v(?!er[rw]\b|m(call|launch|resume|xo|run|load|save)\b)\w+|k(mov|and|or|xor|xnor|not|test|shift|unpck|add)\w*)\s"
)


TILE = re.compile(r"\t(tile\w+|tdp\w+|ldtilecfg|sttilecfg)\b")


def functions_with(instruction):
    """Functions of the library, by their demangled names -> their first instruction that matches."""
    objdump = shutil.which("objdump")
    if not objdump:
        pytest.skip("no objdump")
    command = [objdump, "-d", "-C", "--no-show-raw-insn", Path(_C.__file__).with_name("libdlmkernels.so")]
    found, function = {}, "?"
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = header[1]
        elif (match := instruction.search(line)) and function not in found:
            found[function] = match[1]
    return found


def test_wide_instructions_stay_in_their_namespaces():
    """The linker keeps one copy of an inline function: were it one compiled with wide instructions, every file would use
    it, on processors without them too.
    """
    found = functions_with(WIDE)
    theirs = r"\bdlm::cpu::(avx2|avx512(bf16)?|amx)::"
    assert not {name: what for name, what in found.items() if not re.search(theirs, name)}
    for isa in {"avx2", "avx512"} & set(_C.cpu_isas()):
        assert any(f"::{isa}::" in name and "sum_chunks_as<" in name for name in found), isa


def test_tile_instructions_stay_in_their_namespace():
    found = functions_with(TILE)
    assert not {name: what for name, what in found.items() if "dlm::cpu::amx::" not in name}
    assert any("Item<dlm::cpu::amx::" in name for name in found) == built("amx")


# For each op, the instruction sets that it has kernels of its own for; every other uses those of the next lower one.
KERNELS = {
    "block_attention": ["generic", "avx2", "avx512", "avx512bf16", "amx"],
    "token_confidence": ["generic", "avx2", "avx512"],
    "select_tokens": ["generic"],
    "remask_": ["generic"],
    "verify_drafts": ["generic"],
    "splice_": ["generic"],
    "soft_embedding": ["generic", "avx2", "avx512"],
    "top_candidates": ["generic", "avx2", "avx512"],
    "lm_head_confidence": ["generic", "avx2", "avx512", "avx512bf16", "amx"],
    "lm_head_candidates": ["generic"],  # for what lm_head_confidence and top_candidates leave to it
    "shard_confidence": ["generic"],  # for what token_confidence and lm_head_confidence leave to it
}
ALL = KERNELS["block_attention"]


def built(isa):
    """Whether the kernels of an instruction set are in this build, on whatever processor."""
    return isa in _C.cpu_isas() or f"{isa}: not in this build" not in refusal(isa)


@pytest.mark.parametrize("op", KERNELS)
def test_the_kernels_of_every_instruction_set(op):
    """What is used where an instruction set is in use, as the kernels are chosen."""
    for isa, used in _C.cpu_kernels()[op].items():
        lower = [name for name in ALL[: ALL.index(isa) + 1] if name in KERNELS[op] and built(name)]
        assert used == lower[-1], isa


def test_the_kernels_are_those_of_the_sources():
    """The table above names every file with kernels of an op, and the table of the library every op."""
    assert list(_C.cpu_kernels()) == sorted(KERNELS)
    assert all(list(kernels) == sorted(ALL) for kernels in _C.cpu_kernels().values())
    for op, isas in KERNELS.items():
        name = op.rstrip("_")
        files = {path.stem.removeprefix(f"{name}_") for path in CPU.glob(f"{name}_*.cpp")}
        assert files == set(isas), op
