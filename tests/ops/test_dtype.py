# SPDX-License-Identifier: Apache-2.0
"""csrc/common/dtype.h against torch's conversions, and csrc/common/math.h against float64."""

import pytest
import torch

import native
import numerics

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}


def same_values(a, b):
    """Equal bits, but any NaN equals any other."""
    assert a.dtype == b.dtype
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    different = (a.view(integer) != b.view(integer)) & ~(a.isnan() & b.isnan())
    assert not different.any(), (a[different][:5], b[different][:5])


def all_of(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def floats():
    """Random bit patterns, then values and midpoints of both 16-bit types with their neighbours."""
    torch.manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (2_000_000,), dtype=torch.int64).to(torch.int32)
    near = torch.cat([all_of(dtype).float().view(torch.int32) for dtype in DTYPES.values()])
    halfway = torch.cat([near, near + 0x1000, near + 0x8000])
    return torch.cat([patterns, halfway - 1, halfway, halfway + 1]).view(torch.float32)


@pytest.mark.parametrize("name", DTYPES)
class TestConversions:
    def test_every_value_widens(self, name):
        x = all_of(DTYPES[name])
        same_values(native.call(f"{name}_to_float", x, torch.float32), x.float())

    def test_every_value_returns(self, name):
        x = all_of(DTYPES[name])
        same_values(native.call(f"float_to_{name}", x.float(), x.dtype), x)

    def test_rounds_to_nearest_even(self, name):
        x = floats()
        same_values(native.call(f"float_to_{name}", x, DTYPES[name]), x.to(DTYPES[name]))


def test_exp():
    x = torch.cat([torch.linspace(-87.3, 88.0, 1_000_001), torch.linspace(-1e-3, 1e-3, 1001)])
    gold = x.double().exp()
    ratio = (native.call("exp_normal", x, torch.float32).double() / gold).float()
    peer = x.exp().double() / gold
    numerics.assert_close("exp", ratio, torch.ones_like(gold), peer)
    nothing = torch.tensor([-87.4, -104.0, -1e30, -torch.inf])
    assert torch.equal(native.call("exp_normal", nothing, torch.float32), torch.zeros(4))
