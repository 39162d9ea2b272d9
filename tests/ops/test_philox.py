# SPDX-License-Identifier: Apache-2.0
"""Randomness: Philox known answers, and the same bits in C++ and in the reference."""

import ctypes

import pytest
import torch

import native
import numerics
from dlmkernels import reference

# counter, key, output: kat_vectors of Random123 (Salmon et al.)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


def int32(values):
    """Unsigned 32-bit words as an int32 tensor."""
    words = torch.as_tensor(values, dtype=torch.int64)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def seed_of(key):
    value = key[0] | key[1] << 32
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
class TestKnownAnswers:
    def test_reference(self, counter, key, words, monkeypatch):
        monkeypatch.setitem(reference.STREAMS, "this", counter[2])
        seed, position, step = (torch.tensor(x) for x in (seed_of(key), counter[0], counter[1]))
        out = reference.philox(seed, position, step, "this", 4 * counter[3] + torch.arange(4))
        assert out.tolist() == list(words)

    def test_kernel(self, counter, key, words):
        seed = ctypes.c_uint64(seed_of(key) % 2**64)
        out = native.call("philox", int32([counter]), torch.int32, seed)
        assert torch.equal(out, int32([words]))


@pytest.mark.parametrize("stream", reference.STREAMS)
@pytest.mark.parametrize("seed", [1, -1, 2**63 - 1, 0x0123456789ABCDEF])
def test_kernel_equals_reference(stream, seed):
    torch.manual_seed(0)
    n = 500
    position, step, index4 = torch.randint(0, 2**32, (3, n), dtype=torch.int64)
    index = 4 * index4.unsqueeze(1) + torch.arange(4)
    expected = reference.philox(torch.tensor(seed), position[:, None], step[:, None], stream, index)
    counter = int32(torch.stack([position, step, torch.full((n,), reference.STREAMS[stream]), index4], 1))
    assert torch.equal(native.call("philox", counter, torch.int32, ctypes.c_uint64(seed % 2**64)), int32(expected))


class TestGumbel:
    def words(self):
        torch.manual_seed(0)
        edges = torch.cat([torch.arange(1000), 2**32 - 1 - torch.arange(1000), 2 ** torch.arange(32)])
        return torch.cat([edges, torch.randint(0, 2**32, (1_000_000,), dtype=torch.int64)])

    def test_kernel_equals_reference(self):
        bits = self.words()
        assert torch.equal(native.call("gumbel", int32(bits), torch.float32), reference.gumbel(bits))

    def test_is_the_gumbel_quantile(self):
        bits = self.words()
        bits = bits[bits < 2**31]  # beyond, u itself is rounded
        u = (bits.double() + 0.5) / 2**32
        peer = -torch.log(-torch.log1p(-u.float()))
        numerics.assert_close("gumbel", reference.gumbel(bits), -torch.log(-torch.log1p(-u)), peer)

    def test_bound_of_the_tail(self):
        assert reference.gumbel(torch.tensor([0])).item() <= 22.9
