# SPDX-License-Identifier: Apache-2.0
"""Instructions of the hot loops, as ptxas has them for sm_90: what a pass takes where nothing is masked."""

import pytest

import sass
from simt_programs import ROOT

# (source, kernel, what a pass has so many of, how many, most instructions of a pass): a few per cent above today's.
LOOPS = [
    # A tile of keys, 32 rows: 64 slots of four warps; 32 slots of one.
    ("block_attention_bf16_128", "attend_narrow_kernel<BFloat16, 128, 0>", "HMMA", 64, 350),
    ("block_attention_bf16_128", "attend_wide_kernel<BFloat16, 128>", "HMMA", 128, 460),
    ("block_attention_bf16_64", "attend_narrow_kernel<BFloat16, 64, 0>", "HMMA", 32, 300),
    ("block_attention_bf16_512", "attend_narrow_kernel<BFloat16, 512, 0>", "HMMA", 48, 285),
    # 16 vocabulary entries of 32 rows.
    ("soft_embedding", "soft_product_kernel<BFloat16>", "HMMA", 16, 110),
    # 64 columns of hidden states and of 256 tokens' weights, 32 rows and 128.
    ("lm_head_confidence_bfloat16", "scan_head_kernel<BFloat16, 32>", "HMMA", 32, 79),
    ("lm_head_confidence_bfloat16", "scan_head_kernel<BFloat16, 128>", "HMMA", 128, 197),
    # Four chunks of 256 logits, 32 of a lane, sampled or not.
    ("token_confidence_bfloat16", "scan_chunks_kernel<BFloat16, false>", "MUFU.EX2", 32, 405),
]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    known = {}

    def of(source):
        if source not in known:
            path = ROOT / "csrc" / "cuda" / "instantiations" / f"{source}.cu"
            known[source] = sass.kernels(sass.disassemble(path, "90", tmp_path_factory.mktemp(source)))
        return known[source]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("source, kernel, op, count, most", LOOPS, ids=lambda value: str(value).replace(" ", ""))
def test_hot_loops(kernels, source, kernel, op, count, most):
    found = kernels(source)[kernel].shortest_pass(op, count)
    print(f"{kernel}: {found} instructions with {count} {op}")
    assert found is not None, f"{kernel} has no loop with {count} {op}"
    assert found <= most


def test_a_pass_is_counted_right():
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   FADD R1, R1, R2 ;
        /*0040*/                   FADD R1, R1, R2 ;
.L_x_1:
        /*0050*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""
    kernel = sass.Kernel(text)
    assert kernel.shortest_pass("HMMA", 2) == 4
    assert kernel.shortest_pass("FADD", 2) == 6
    assert kernel.shortest_pass("HMMA", 3) is None
