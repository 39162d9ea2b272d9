# SPDX-License-Identifier: Apache-2.0
"""The tolerance policy must itself catch what it is for."""

import pytest
import torch

import numerics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestPolicy:
    def case(self, dtype):
        torch.manual_seed(0)
        gold = torch.randn(64, 128, dtype=torch.float64)
        return gold, gold.to(dtype), gold.to(dtype)

    def test_accepts_rounding(self, dtype):
        gold, out, peer = self.case(dtype)
        numerics.assert_close("x", out, gold, peer)

    def test_catches_one_wrong_element(self, dtype):
        gold, out, peer = self.case(dtype)
        out[3, 5] += 0.1 if dtype == torch.bfloat16 else 1e-5
        with pytest.raises(AssertionError, match=r"worst error .* at \(3, 5\)"):
            numerics.assert_close("x", out, gold, peer)

    def test_catches_a_bias(self, dtype):
        gold, out, peer = self.case(dtype)
        biased = (gold + numerics.ulp(gold, dtype) * 0.6).to(dtype)
        with pytest.raises(AssertionError):
            numerics.assert_close("x", biased, gold, peer)

    def test_catches_a_shifted_mask(self, dtype):
        gold, out, peer = self.case(dtype)
        gold[:, 7] = -torch.inf
        out[:, 8] = -torch.inf
        with pytest.raises(AssertionError, match="-inf"):
            numerics.assert_close("x", out, gold, peer)


class TestDistribution:
    PROBABILITIES = (0.5, 0.3, 0.15, 0.05)

    def draw(self, probabilities, n=40000):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.multinomial(torch.tensor(probabilities), n, replacement=True, generator=generator)
        return drawn.bincount(minlength=len(probabilities))

    def test_accepts_the_right_one(self):
        numerics.assert_distribution("x", self.draw(self.PROBABILITIES), self.PROBABILITIES)

    def test_catches_a_small_bias(self):
        with pytest.raises(AssertionError, match="chi-square"):
            numerics.assert_distribution("x", self.draw((0.48, 0.32, 0.15, 0.05)), self.PROBABILITIES)

    def test_catches_the_impossible(self):
        with pytest.raises(AssertionError, match="probability 0"):
            numerics.assert_distribution("x", [10, 10, 1], [0.5, 0.5, 0.0])
