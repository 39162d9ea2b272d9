# SPDX-License-Identifier: Apache-2.0
"""Rules of causal models that know no masks: one token a forward, or as many as a drafter has guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..checks import Check, integer
from .base import Rule


def _width(name: str, value: Any) -> int | str | None:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name} must be None, 'auto' or an integer of at least 1; got {value!r}")
        return value
    return integer(1, optional=True)(name, value)


def _drafter(name: str, value: Any) -> Any:
    """Known by what it has: a drafter needs transformers, and rules do not."""
    if getattr(getattr(value, "form", None), "drafts", None) is None:
        raise TypeError(
            f"{name} must be what dlmkernels.load_drafter(path, target) returns; got {type(value).__name__}"
        )
    return value


@dataclass(frozen=True)
class NextToken(Rule):
    """One token a forward, from left to right, as a causal model is decoded without further ado.

    For any causal model that transformers loads, whether or not it has a mask token; all of its tokens may be said. A
    token is drawn with the noise of its place alone, so that `Drafted` with the same seed says the same.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[str] = "continuations"
    noise: ClassVar[str] = "none"
    by_block: ClassVar[bool] = False

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({
            "attention", "block_grid", "block_length", "cache", "defer_token_ids", "fuse_commit", "logit_alignment",
            "mask_token_id", "order_temperature", "score", "seeded", "steps", "sub_block_length",
        })  # fmt: skip

    def select(self, step):
        raise TypeError(f"{type(self).__name__} has a program of its own and selects nothing of a step")


@dataclass(frozen=True)
class Drafted(NextToken):
    """What `NextToken` says, token for token, in fewer forwards: a drafter guesses, and the model verifies.

    Speculative decoding (Leviathan et al., ICML 2023) with a block-diffusion drafter (DFlash, arXiv:2602.06036). In
    each step the drafter fills a block of masks behind the last token, and one forward of the model reads the drafts.
    From the left, a draft is accepted if it is the very token that the model says in its place; the first that is not
    is replaced by that token, and after the last comes one more. So at any temperature, under any filter, the tokens
    are the model's own. Drafts are drawn with the noise that the model draws with, so that they agree more often.

    Attributes
    ----------
    drafter : Drafter
        What `dlmkernels.load_drafter` has loaded for the model. `generate(…, drafter=drafter)` says the same as
        `generate(…, rule=Drafted(drafter))`.
    width : int or "auto", optional
        How many tokens are drafted at once, at most as many as the drafter was trained for. None: that many. "auto":
        each request asks for the number that decides most tokens a second, by how many of its drafts have been
        accepted lately and how long steps take on this machine, which is measured when a batch of so many requests is
        first decoded with the drafter; where drafts are worth nothing, none. The text is the same, but how many
        forwards it takes is not.
    tree : int, optional
        With a number, so many drafts in a tree, its likeliest paths, in place of a chain of the likeliest tokens
        (DDTree, arXiv:2604.12989): `width` is its depth then. For drafters whose drafts are independent of each other
        (DFlash) and targets without sliding windows.
    """

    limits: ClassVar[Mapping[str, Check]] = {
        "width": _width, "tree": integer(2, 255, optional=True), "drafter": _drafter,
    }  # fmt: skip

    drafter: Any = None
    width: int | str | None = None
    tree: int | None = None

    def __post_init__(self):
        super().__post_init__()
        drafts = self.drafter.form.drafts
        if isinstance(self.width, int) and self.width > drafts:
            raise ValueError(f"width must be at most the drafter's {drafts} drafts; got {self.width}")
        if self.tree is not None and self.width == "auto":
            raise ValueError("width='auto' cannot be used with tree, whose number of drafts is fixed")
