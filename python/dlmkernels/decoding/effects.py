# SPDX-License-Identifier: Apache-2.0
"""Checks that every option a user sets can have an effect in the decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .checks import each
from .config import APPROXIMATE, DecodingConfig
from .features import is_by_block
from .rules import VariableLength
from .scores import Random, score_named


class Need(NamedTuple):
    """The condition under which a field of a configuration has an effect, and its description for messages."""

    is_met: Callable[[DecodingConfig], bool]
    text: str


def _filters(c: DecodingConfig) -> bool:
    return c.samples or c.distribution == "filtered"


def _by_parts(c: DecodingConfig) -> bool:
    return c.cache == "block" and c.sub_block_length is not None


def _refreshes(c: DecodingConfig) -> bool:
    return c.cache in APPROXIMATE or (c.sub_block_cache and _by_parts(c))


BY_BLOCK = "a rule that decodes block by block"
FILTERED = "temperature above 0 or distribution='filtered'"
APPROXIMATED = "cache='prefix', 'dual' or 'delayed', or sub_block_cache"

#: Fields that only have an effect together with others. Those in `Rule.ignores` need another rule; all other fields
#: always have an effect.
NEEDS: dict[str, Need] = {
    "steps": Need(lambda c: c.rule.uses_steps, "a rule with a fixed schedule, such as Quota (others take as many "
                  "forwards as they need)"),
    "top_k": Need(_filters, FILTERED),
    "top_p": Need(_filters, FILTERED),
    "top_p_first": Need(
        lambda c: _filters(c) and max(each(c.top_k)) > 0 and min(each(c.top_p)) < 1, "top_k, top_p and " + FILTERED
    ),
    "keep_crossing": Need(lambda c: _filters(c) and min(each(c.top_p)) < 1, "top_p below 1 and " + FILTERED),
    "distribution": Need(
        lambda c: c.samples or (c.distribution == "filtered" and c.filters),
        "temperature above 0 (or, for 'filtered', top_k or top_p)",
    ),
    "order_temperature": Need(
        lambda c: not isinstance(score_named(c.score), Random), "a score other than 'random', which is random already"
    ),
    "sub_block_cache": Need(_by_parts, "cache='block' and sub_block_length"),
    "warmup": Need(_refreshes, APPROXIMATED),
    "refresh_interval": Need(_refreshes, APPROXIMATED),
    "vicinity": Need(
        lambda c: c.cache == "dual" or (c.cache == "prefix" and c.vicinity[0] > 0),
        "cache='dual', or, for positions left of the block, cache='prefix'",
    ),
    "fuse_commit": Need(
        lambda c: is_by_block(c.cache) and c.rule.by_block and not c.seeded and c.attention != "causal-context",
        "cache='block' or 'focus' with " + BY_BLOCK + ", seeded=False, and attention other than 'causal-context'",
    ),
    "eos_token_id": Need(
        lambda c: c.eos_policy != "none" or "eos_policy" in c.asked or c.rule.reads_ends,
        "eos_policy='fill' or 'block', or a rule that reads end tokens",
    ),
    "eos_policy": Need(lambda c: c.eos_policy != "block" or c.rule.by_block, "another value, or " + BY_BLOCK),
    "block_grid": Need(lambda c: c.attention == "block", "attention='block'"),
}  # fmt: skip

#: The same for `infill`.
NEEDS_TO_INFILL = NEEDS | {
    "max_new_tokens": Need(
        lambda c: isinstance(c.rule, VariableLength),
        "a rule that changes the length, such as Expanding; other rules decode exactly the mask tokens that are there",
    ),
}


def check_effects(wanted: DecodingConfig, resolved: DecodingConfig, infills: bool = False) -> None:
    """Raise a ValueError for an option that the user has set but that has no effect.

    `wanted` is the user's configuration. `resolved` is the one used for decoding, with the model's defaults filled in.
    """
    needs, rule = NEEDS_TO_INFILL if infills else NEEDS, type(resolved.rule).__name__
    for name in sorted(wanted.asked):
        need = needs.get(name)
        if name in resolved.rule.ignores:
            what = f"the rule ignores {name}"
        elif need is not None and not need.is_met(resolved):
            what = f"{name} needs {need.text}"
        else:
            continue
        other = ", or choose another rule" if "rule" in wanted.asked and name != "rule" else ""
        raise ValueError(
            f"{name}={getattr(wanted, name)!r} has no effect with rule {rule} here: {what}. Leave out {name}{other}"
        )
