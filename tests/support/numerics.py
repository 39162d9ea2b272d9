# SPDX-License-Identifier: Apache-2.0
"""The tolerance policy: what "equal" means in these tests. No other file holds a tolerance.

Inputs are first rounded to the op's dtype. *gold* is the reference in float64 on them, *peer* the naive algorithm
wholly in the op's dtype. A float output passes when its worst error is at most twice the peer's plus one unit in the
last place, and its mean error at most 1.5 times the peer's plus a quarter unit (a bias is a bug even where no single
element is far off). Ids, masks and counts are compared with `torch.equal`.
"""

import math

import torch

MAX_RATIO, MEAN_RATIO = 2.0, 1.5
MAX_NORMAL_SCORE = 4.0  # of a statistic that is normal when all is well
TWO_PROGRAMS = 2e-5  # two float32 programs of one small model differ by less than this in their probabilities


def ulp(gold, dtype):
    """Rounding unit of `dtype` at the scale of `gold`, measured: how far adding and removing 0.3 moves its values."""
    finite = gold[torch.isfinite(gold)].to(dtype)
    if finite.numel() == 0:
        return 0.0
    moved = ((finite + 0.3) - 0.3 - finite).abs().max().double().item()
    # 0.3 is absorbed without a trace when it is far below the values' own unit
    spacing = finite.abs().max().double().item() * torch.finfo(dtype).eps
    return 2 * max(moved, spacing / 2)


def assert_close(name, out, gold, peer):
    """Check `out` (the op's) against `gold` (float64), allowing what `peer` (naive, in the op's dtype) needs."""
    assert out.shape == gold.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(gold.shape)}"
    o, g, p = out.double(), gold.double(), peer.double()
    for what, test in (("NaN", torch.isnan), ("+inf", lambda t: t == math.inf), ("-inf", lambda t: t == -math.inf)):
        assert torch.equal(test(o), test(g)), f"{name}: {what} in {test(o).sum()} places, expected {test(g).sum()}"
    finite = torch.isfinite(g)
    if not finite.any():
        return
    error = torch.where(finite, (o - g).abs(), 0.0)
    peer_error = torch.where(finite & torch.isfinite(p), (p - g).abs(), 0.0)
    unit = ulp(gold, out.dtype)
    worst, peer_worst = error.max().item(), peer_error.max().item()
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)) if error.dim() else ()
    assert worst <= MAX_RATIO * peer_worst + unit, (
        f"{name}: worst error {worst:.3e} at {at} (got {o[at]:.9g}, gold {g[at]:.9g}); "
        f"peer's worst {peer_worst:.3e}, unit {unit:.3e}"
    )
    mean, peer_mean = (e.sum().item() / finite.sum().item() for e in (error, peer_error))
    assert mean <= MEAN_RATIO * peer_mean + unit / 4, (
        f"{name}: mean error {mean:.3e} looks like a bias; peer's mean {peer_mean:.3e}, unit {unit:.3e}"
    )


def assert_same_probabilities(out, expected):
    """Check probabilities that two float32 programs of one small model computed."""
    torch.testing.assert_close(out, expected, rtol=0, atol=TWO_PROGRAMS)


def far(a, b):
    """Whether two tensors differ by far more than rounding explains."""
    return (a - b).abs().max().item() > 1000 * TWO_PROGRAMS


def poison_(t):
    """Fill a tensor with NaN (or a wild integer), so that reading what was never written shows."""
    return t.fill_(math.nan if t.is_floating_point() else torch.iinfo(t.dtype).min // 2 if t.dtype != torch.bool else 1)


def assert_distribution(name, counts, probabilities):
    """Check observed counts against exact probabilities: Pearson's chi-square, by the Wilson-Hilferty normal score.

    A fair sampler fails one such test in some 30 000; the draws are fixed by their seeds, so a test passes or fails
    for ever.
    """
    counts, p = torch.as_tensor(counts).double(), torch.as_tensor(probabilities).double()
    expected = p * counts.sum()
    assert counts[p == 0].sum() == 0, f"{name}: drew what has probability 0"
    counts, expected = counts[p > 0], expected[p > 0]
    assert expected.min() >= 5, f"{name}: too few draws for a chi-square test"
    freedom = len(counts) - 1
    if freedom == 0:
        return  # one outcome, and it was the only one
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    spread = 2 / (9 * freedom)
    score = ((chi_square / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(spread)
    assert score < MAX_NORMAL_SCORE, f"{name}: chi-square {chi_square:.1f} with {freedom} degrees of freedom"
