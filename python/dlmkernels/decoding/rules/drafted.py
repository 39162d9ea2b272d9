# SPDX-License-Identifier: Apache-2.0
"""Rules for causal models without mask tokens: one token per forward pass, or several guessed by a drafter."""

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
    """Accept a drafter by its attributes rather than its class, which would require importing transformers."""
    if getattr(getattr(value, "form", None), "drafts", None) is None:
        raise TypeError(
            f"{name} must be a drafter from dlmkernels.load_drafter(path, target); got {type(value).__name__}"
        )
    return value


@dataclass(frozen=True)
class NextToken(Rule):
    """Decode one token per forward pass, from left to right: ordinary autoregressive decoding of a causal model.

    Works with any causal model that transformers loads, with or without a mask token; any of its tokens may be
    generated. The noise that samples a token depends only on its position, so that `Drafted` with the same seed
    generates the same text.
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
        raise TypeError(f"{type(self).__name__} has its own decoding program and does not implement select")


@dataclass(frozen=True)
class Drafted(NextToken):
    """Generate exactly the tokens of `NextToken` in fewer forward passes: a drafter guesses, and the model verifies.

    Speculative decoding (Leviathan et al., ICML 2023) with a block-diffusion drafter (DFlash, arXiv:2602.06036). In
    each step, the drafter fills a block of masks after the last token, and one forward pass of the model reads these
    drafts. From left to right, a draft is accepted if it is the token that the model itself chooses at that position.
    The first draft that differs is replaced by the model's token. If all are accepted, one more token follows them. At
    any temperature and with any filter, the text is therefore the model's own. Drafts are sampled with the same noise
    as the model's tokens, so that they agree more often.

    Attributes
    ----------
    drafter : Drafter
        Drafter that `dlmkernels.load_drafter` has loaded for the model. `generate(…, drafter=drafter)` is short for
        `generate(…, rule=Drafted(drafter))`.
    width : int or "auto", optional
        Number of tokens to draft at once, at most the number that the drafter was trained for, which is the default.
        With "auto", each request uses the number that decides the most tokens per second, possibly 0. It follows from
        how many of the request's recent drafts were accepted and from the duration of a step on this machine, which is
        measured the first time a batch of that size is decoded with the drafter. The text does not depend on it, but
        the number of forward passes does.
    tree : int, optional
        If given, number of drafts, 2 to 255, in a tree of the most likely paths, instead of a chain of the most likely
        tokens (DDTree, arXiv:2604.12989). `width` is then the depth of the tree. Requires a drafter whose drafts do not
        depend on each other (DFlash) and a target without sliding windows.
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
            raise ValueError(
                f"width='auto' cannot be used with tree, whose number of drafts is fixed; got tree={self.tree}"
            )
