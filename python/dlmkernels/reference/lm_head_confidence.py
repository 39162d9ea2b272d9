# SPDX-License-Identifier: Apache-2.0
"""Specification of `lm_head_confidence` in plain torch."""

import torch
from torch import Tensor

from .token_confidence import token_confidence


def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    row_map: Tensor | None = None,
    given: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    cfg_scale: Tensor | None = None,
    bias: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    top_p_first: bool = False,
    keep_crossing: bool = True,
    distribution: str = "raw",
    seed: Tensor | None = None,
    step: Tensor | None = None,
    position: Tensor | None = None,
    redraw: Tensor | None = None,
    with_margin: bool = True,
    with_entropy: bool = True,
) -> tuple[Tensor, ...]:
    """Compute `token_confidence` of the logits ``hidden @ weight.T`` and, with guidance, ``uncond_hidden @ weight.T``.

    Products are summed in float32 (float64 if `hidden` is float64), in any order, and logits are rounded to the dtype
    of `hidden`.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def head(states: Tensor) -> Tensor:
        return (states.to(wide) @ weight.to(wide).t()).to(hidden.dtype)

    return token_confidence(
        head(hidden), row_map=row_map, given=given,
        uncond_logits=None if uncond_hidden is None else head(uncond_hidden), cfg_scale=cfg_scale, bias=bias,
        banned=banned, bitmask=bitmask, temperature=temperature, top_k=top_k, top_p=top_p, top_p_first=top_p_first,
        keep_crossing=keep_crossing, distribution=distribution, seed=seed, step=step, position=position, redraw=redraw,
        with_margin=with_margin, with_entropy=with_entropy,
    )  # fmt: skip
