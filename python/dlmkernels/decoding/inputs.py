# SPDX-License-Identifier: Apache-2.0
"""Conversion of prompts (token ids, tokenizer output, text or chats) to one padded tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_readable, listed
from .config import SpecialTokens

#: keys of a tokenizer's output that decoding does not need
HARMLESS = {"special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping", "num_truncated_tokens"}
#: keys with the segment of each token; only segment 0 is supported
SEGMENTS = ("token_type_ids", "mm_token_type_ids")

Rows = Sequence[Sequence[int]]


class Prompts(NamedTuple):
    """Prompts in the form that decoding takes.

    Attributes
    ----------
    tokens : object
        int64 `[B, P]`, padded on the left. A tensor or None that was passed as a prompt is kept unchanged.
    attention_mask : Tensor, optional
        `[B, P]`, 0 for padding.
    """

    tokens: Any
    attention_mask: Tensor | None


def read_prompts(
    name: str, inputs, attention_mask: Tensor | None, tokenizer, device: torch.device, pad: int
) -> Prompts:  # fmt: skip
    """Convert `inputs` of any supported form to token ids `[B, P]` and their attention mask.

    Parameters
    ----------
    name : str
        Name of the argument in error messages.
    inputs : Tensor or str or sequence or mapping
        A tensor is passed through unchanged, as is None. Text, a list of texts, a chat (a list of messages, each a
        dict with "role" and "content") and a list of chats need the `tokenizer`. A list of ids is one prompt; a list of
        lists of ids (or of 1-D tensors) is several prompts, of any lengths. A mapping is the output of a tokenizer:
        `input_ids`, and `attention_mask` if there is padding, on either side.
    pad : int
        Token with which shorter rows are padded on the left.

    Raises
    ------
    ValueError or TypeError
        If `inputs` has none of these forms, contains no token, or needs a tokenizer and none was passed.
    """
    if inputs is None or isinstance(inputs, Tensor):
        return Prompts(inputs, attention_mask)
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask can only be passed with a tensor of token ids; {name} is {_kind(inputs)}, for which "
            "padding is handled automatically"
        )
    if isinstance(inputs, Mapping):
        rows = _rows_of_mapping(name, inputs)
    elif _is_text(inputs):
        rows = _tokenized(name, inputs, tokenizer)
    elif hasattr(inputs, "dtype") and hasattr(inputs, "tolist"):  # a numpy array
        rows = _rows_of_ids(name, listed(name, inputs))
    else:
        rows = _rows_of_ids(name, inputs)
    if not rows:
        raise ValueError(f"{name} is empty: it must contain at least one prompt")
    if [] in rows:
        raise ValueError(f"{name} has no tokens in row {rows.index([])}")
    return padded(rows, device, pad)


def read_canvases(
    name: str, inputs, attention_mask: Tensor | None, tokenizer, device: torch.device, special: SpecialTokens
) -> Prompts:  # fmt: skip
    """Like `read_prompts`, for canvases whose masks are to be filled in: text must contain the mask token."""
    found = read_prompts(name, inputs, attention_mask, tokenizer, device, filler(special))
    if _is_text(inputs) and not bool((found.tokens == special.mask).any()):
        mask = getattr(tokenizer, "mask_token", None)
        if mask is None and hasattr(tokenizer, "decode"):
            mask = tokenizer.decode([special.mask])
        what = f"token {special.mask}" if mask is None else repr(mask)
        raise ValueError(f"{name} contains no mask token: write {what} wherever a token is to be filled in")
    return found


def filler(special: SpecialTokens) -> int:
    """Return the token that pads shorter prompts on the left: the padding token, unless that is the mask token."""
    return special.pad if special.pad != special.mask else int(special.mask == 0)


def padded(rows: Rows, device: torch.device, pad: int) -> Prompts:
    """Combine rows of any lengths into one tensor, padded on the left."""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64, device="cpu")
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64, device="cpu")
    return Prompts(tokens.to(device), None if bool(mask.all()) else mask.to(device))


def read_options(model, config, options: Mapping[str, Any], tokenizer) -> dict[str, Any]:
    """Prepare the keyword options of a decoding: drop token-type ids, and take a missing mask id from the tokenizer.

    The tokenizer's mask id is used only if neither the options, nor `config`, nor the model's configuration has one.
    """
    if not (tokenizer is None or callable(tokenizer) or hasattr(tokenizer, "decode")):
        raise TypeError(f"tokenizer must be a transformers tokenizer; got {type(tokenizer).__name__}")
    options = dict(options)
    for key in SEGMENTS:
        if key in options:
            _check_segment(key, options.pop(key))
    mask = getattr(tokenizer, "mask_token_id", None)
    sources = (options, config, getattr(model, "config", None))
    knows_masks = all(getattr(_get(source, "rule"), "noise", "mask") != "none" for source in (options, config))
    if mask is not None and knows_masks and all(_get(source, "mask_token_id") is None for source in sources):
        options["mask_token_id"] = mask
    return options


def _get(source, name: str):
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def _is_text(inputs) -> bool:
    """Return whether `inputs` is a text, a chat, or a list of either."""
    if isinstance(inputs, str):
        return True
    if not isinstance(inputs, Sequence) or not inputs:
        return False
    first = inputs[0]
    return isinstance(first, (str, Mapping)) or (
        isinstance(first, Sequence) and len(first) > 0 and isinstance(first[0], Mapping)
    )


def _tokenized(name: str, inputs, tokenizer) -> list[list[int]]:
    """Tokenize texts or chats; a single text or chat gives one row."""
    if tokenizer is None:
        raise ValueError(
            f"{name} is text: pass tokenizer=transformers.AutoTokenizer.from_pretrained(…), or pass token ids instead"
        )
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be a transformers tokenizer; got {type(tokenizer).__name__}")
    one = isinstance(inputs, str) or isinstance(inputs[0], Mapping)
    items = [inputs] if one else list(inputs)
    return [_ids_of(name, item, tokenizer) for item in items]


def _ids_of(name: str, item, tokenizer) -> list[int]:
    is_chat = not isinstance(item, str)
    if is_chat:
        if not isinstance(item, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in item):
            is_chat = isinstance(item, Sequence) and any(isinstance(m, Mapping) for m in item)
            why = "a message without 'role' in" if is_chat else "something that is neither (do not mix text and ids):"
            raise TypeError(
                f"{name} must contain texts, or chats whose messages are dicts such as "
                f"{{'role': 'user', 'content': '…'}}; got {why} {item!r:.80}"
            )
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{name} is a chat, but this tokenizer has no chat template: pass text, or set tokenizer.chat_template"
            )
        item = tokenizer.apply_chat_template(list(item), add_generation_prompt=True, tokenize=False)
    try:
        ids = [int(i) for i in tokenizer(item, add_special_tokens=not is_chat)["input_ids"]]
    except (KeyError, TypeError, ValueError) as error:
        raise TypeError(
            f"tokenizer must be a transformers tokenizer; {type(tokenizer).__name__} did not return input_ids for the "
            f"text of {name}: {error!r}"
        ) from error
    if not ids:
        raise ValueError(f"{name} must contain at least one token; the tokenizer returned none for {item!r}")
    unknown = _unknown_token(tokenizer)
    if unknown is not None and unknown not in item:
        token = tokenizer.convert_tokens_to_ids(unknown)
        if token in ids and token == getattr(tokenizer, "pad_token_id", None):
            raise ValueError(f"{name} contains characters that the tokenizer does not know; got {item!r}")
    return ids


def _unknown_token(tokenizer) -> str | None:
    """Return the token for unknown characters, which the model of a fast tokenizer may have under another name."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return getattr(model, "unk_token", None) or getattr(tokenizer, "unk_token", None)


def _rows_of_mapping(name: str, inputs: Mapping) -> list[list[int]]:
    """Return the rows of a tokenizer's output, without their padding."""
    known = {"input_ids", "attention_mask", *SEGMENTS, *HARMLESS}
    if unknown := sorted(str(key) for key in inputs if key not in known):
        raise ValueError(f"{name}: unsupported keys {', '.join(unknown)}; supported: {', '.join(sorted(known))}")
    if "input_ids" not in inputs:
        raise ValueError(f"{name} must be the output of a tokenizer, with input_ids; got the keys {sorted(inputs)}")
    for key in SEGMENTS:
        if key in inputs:
            _check_segment(key, inputs[key])
    rows = _rows_of_ids(f"{name}['input_ids']", listed(f"{name}['input_ids']", inputs["input_ids"]))
    if (mask := inputs.get("attention_mask")) is None:
        return rows
    mask = listed(f"{name}['attention_mask']", mask)
    masks = [_as_lists(row) for row in mask] if isinstance(mask, (list, tuple)) else []
    if masks and not any(isinstance(row, (list, tuple)) for row in masks):
        masks = [masks]
    if not masks or not all(isinstance(row, (list, tuple)) for row in masks):
        raise TypeError(
            f"{name}['attention_mask'] must be a list or tensor of 0 and 1, or one for each row; got {mask!r}"
        )
    if [len(row) for row in masks] != [len(row) for row in rows]:
        raise ValueError(
            f"{name}: attention_mask and input_ids must have the same lengths; got {[len(row) for row in masks]} and "
            f"{[len(row) for row in rows]}"
        )
    for number, row in enumerate(masks):
        if other := [x for x in row if x not in (0, 1)]:
            raise ValueError(f"{name}: attention_mask must hold 0 for padding and 1 for tokens; got {other[0]!r}")
        if "0" in "".join("1" if x else "0" for x in row).strip("0"):
            raise ValueError(f"{name}: attention_mask of row {number} has a 0 between tokens; only padding may be 0")
    return [[token for token, is_token in zip(row, mask) if is_token] for row, mask in zip(rows, masks)]


def _rows_of_ids(name: str, inputs) -> list[list[int]]:
    """Return a list of ids, or of lists of ids, as rows."""
    is_list = isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes)
    if is_list and inputs and all(isinstance(i, Integral) for i in inputs):
        inputs = [inputs]
    rows = [_as_lists(row) for row in inputs] if is_list else None
    if rows is None or not all(isinstance(row, (list, tuple)) for row in rows):
        raise TypeError(
            f"{name} must be an int64 tensor of token ids, a list of ids, a list of lists of ids, the output of a "
            f"tokenizer, or texts or chats with tokenizer=…; got {_kind(inputs)}"
        )
    for row in rows:
        if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in row):
            raise TypeError(f"{name} must contain token ids, which are integers; got {row!r}")
        if beyond := [i for i in row if not -(2**63) <= i < 2**63]:
            raise ValueError(f"{name} must contain token ids, which fit into 64 bits; got {beyond[0]}")
    return [[int(i) for i in row] for row in rows]


def _as_lists(values):
    check_readable("token ids", values)
    return values.tolist() if hasattr(values, "tolist") else values


def _check_segment(key: str, values) -> None:
    if values is not None and any(not isinstance(x, (int, float)) or x != 0 for x in _flat(values)):
        raise ValueError(
            f"{key} must be None, or 0 everywhere, because a prompt and its answer form one segment: tokenize a single "
            f"text, or omit {key}"
        )


def _flat(values) -> list[int]:
    values = _as_lists(values)
    return [x for row in values for x in _flat(row)] if isinstance(values, (list, tuple)) else [values]


def _kind(inputs) -> str:
    if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes) and inputs:
        kinds = dict.fromkeys(type(one).__name__ for one in inputs)
        return f"a {type(inputs).__name__} of {' and '.join(kinds)}"
    return f"text ({inputs!r})" if isinstance(inputs, str) else type(inputs).__name__
