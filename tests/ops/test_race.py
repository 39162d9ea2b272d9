# SPDX-License-Identifier: Apache-2.0
"""The race in two levels: the same bits in C++ and in the reference, and the exact distribution from both."""

import pytest
import torch

import native
import numerics
from dlmkernels import ops
from dlmkernels.reference import race

N = 20_000


def draw(z, rows=N, **options):
    """Tokens of `rows` positions with the same logits `[V]`."""
    options = {"temperature": 1.0, "seed": 7, "position": torch.arange(rows, dtype=torch.int32)} | options
    row_map = torch.zeros(rows, dtype=torch.int32)
    return ops.token_confidence(z[None], row_map=row_map, with_margin=False, with_entropy=False, **options).token


def counted(tokens, size):
    return torch.bincount(tokens, minlength=size)


class TestBits:
    def test_fma(self):
        a, b, c = (torch.randn(50_000) * 10 ** (6 * torch.rand(50_000) - 3) for _ in range(3))
        c[:25_000] = -(a * b)[:25_000] * (1 + 1e-6 * torch.randn(25_000))  # what is left is in the product's low bits
        expected = native.call("fma_rn", torch.stack((a, b, c), 1).contiguous(), torch.float32).flatten()[: len(a)]
        assert torch.equal(race.fma(a, b, c), expected)

    def test_exponential(self):
        x = torch.cat((-90 * torch.rand(100_000), torch.tensor([0.0, -0.0, -87.33654, -87.4, -1e30, -torch.inf])))
        y = race.chunk_exp(x)
        assert torch.equal(y, native.call("chunk_exp", x, torch.float32))
        exact = torch.exp(x.double())
        normal = x > -87.3
        assert ((y.double() - exact) / exact)[normal].abs().max() < 2e-7
        assert y[-6:].tolist() == [1.0, 1.0, y[-4].item(), 0.0, 0.0, 0.0] and y[-4] > 0

    def test_sum(self):
        x = torch.rand(100, 256)
        expected = native.call("chunk_sum", x, torch.float32).flatten()[: len(x)]
        assert torch.equal(race.chunk_sum(x), expected)


class TestDistribution:
    """Each vocabulary has more than one chunk, the last of them short."""

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_softmax(self, temperature):
        z = torch.randn(700)
        p = torch.softmax(z.double() / temperature, 0)
        often = p * N >= 20
        counts = counted(draw(z, temperature=temperature), 700)
        grouped = torch.cat((counts[often], counts[~often].sum()[None]))
        numerics.assert_distribution("softmax", grouped, torch.cat((p[often], p[~often].sum()[None])))

    def test_few_tokens_far_apart(self):
        z = torch.full((5000,), -30.0)
        at = torch.arange(20) * 249 + 3
        z[at] = -(torch.arange(20) % 5) * 0.5
        counts = counted(draw(z), 5000)[at]
        numerics.assert_distribution("tokens", counts, torch.softmax(z.double(), 0)[at])

    @pytest.mark.parametrize("options", [{"top_k": 9}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.7}])
    def test_filtered(self, options):
        z = 2 * torch.randn(600)
        tokens = draw(z, **options)
        kept = tokens.unique()
        assert z[kept].min() > z[torch.tensor([v for v in range(600) if v not in kept.tolist()])].max()
        numerics.assert_distribution("kept", counted(tokens, 600)[kept], torch.softmax(z[kept].double(), 0))

    def test_a_rare_token(self):
        """One of probability 1e-4, alone in its chunk, comes as often as it should."""
        z = torch.full((600,), -torch.inf)
        z[5], z[300] = 0.0, torch.tensor(1e-4).logit()
        rows, count = 1_000_000, 0
        for first in range(0, rows, 100_000):
            position = torch.arange(first, first + 100_000, dtype=torch.int32)
            count += (draw(z, 100_000, position=position) == 300).sum().item()
        assert abs(count - 1e-4 * rows) < 5 * 10

    def test_a_refused_token_is_not_drawn_again_and_the_rest_keep_their_law(self):
        z = torch.tensor([1.0, 0.0, 0.5, 0.2, -0.3])
        first = draw(z)
        banned = first[:, None]
        second = draw(z, banned=banned, redraw=torch.ones(N, dtype=torch.int32))
        assert (first != second).all()
        p = torch.softmax(z.double(), 0)
        for token in range(5):
            rest = torch.arange(5) != token
            counts = counted(second[first == token], 5)[rest]
            numerics.assert_distribution("after", counts, p[rest] / p[rest].sum())


class TestPromises:
    def test_padding_changes_nothing(self):
        z = torch.randn(700)
        padded = torch.cat((z, torch.full((1000,), -torch.inf)))
        assert torch.equal(draw(z, 500), draw(padded, 500))

    def test_a_redraw_is_another_draw(self):
        z = torch.randn(700)
        draws = [draw(z, 500, redraw=i) for i in range(3)]
        assert torch.equal(draws[0], draw(z, 500))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (draws[a] == draws[b]).float().mean() < 0.1

    def test_shared_noise_couples_similar_logits(self):
        """With logits 0.3 apart, equal tokens nearly as often as the distributions allow (1 - total variation)."""
        z = 3 * torch.randn(2000)
        other = z + 0.3 * torch.randn(2000)
        p, q = (torch.softmax(x.double(), 0) for x in (z, other))
        most = torch.minimum(p, q).sum()
        equal = (draw(z, 4000) == draw(other, 4000)).double().mean()
        assert 0.85 * most < equal <= most + 0.03
        assert (draw(z, 4000) == draw(other, 4000, seed=8)).double().mean() < 0.5 * most
