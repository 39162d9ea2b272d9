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


def poison_(t):
    """Fill a tensor with NaN (or a wild integer), so that reading what was never written shows."""
    return t.fill_(math.nan if t.is_floating_point() else torch.iinfo(t.dtype).min // 2 if t.dtype != torch.bool else 1)


def assert_drawn_from(name, counts, probability):
    """Check by Pearson's chi-square that `counts` are draws from `probability`; outcomes of probability 0 are exact."""
    counts, probability = counts.double(), probability.double()
    possible = probability > 0
    assert not counts[~possible].any(), f"{name}: impossible outcomes drawn: {counts[~possible].sum():.0f}"
    expected = probability[possible] * counts.sum()
    assert expected.min() >= 5, f"{name}: too few draws for the test: {expected.min():.1f} expected of some outcome"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    chance = torch.special.gammaincc(freedom, statistic / 2).item()
    assert chance > 1e-4, f"{name}: chi-square {statistic:.1f} with {2 * freedom:.0f} degrees: chance {chance:.1e}"
