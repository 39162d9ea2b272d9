# SPDX-License-Identifier: Apache-2.0
"""Find the text of each token of a tokenizer."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Return the byte for each character of a byte-level vocabulary (the table of GPT-2's tokenizer)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def token_texts(tokenizer: Any) -> list[str | None]:
    """Return the text of each token in the order of ids; None for special tokens and for parts of a character.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        A tokenizer whose vocabulary is byte-level (GPT-2, Llama 3, Qwen), has "▁" for spaces (SentencePiece), or is
        plain text.

    Raises
    ------
    ValueError
        If the texts of an encoded text's tokens do not add up to that text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_bytes = backend is not None and "ByteLevel" in f"{backend.decoder}{backend.pre_tokenizer}"
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts: list[str | None] = []
    for token, piece in enumerate(pieces):
        if token in special or piece is None:
            texts.append(None)
        elif token in added:
            texts.append(added[token])
        else:
            texts.append(_of_bytes(piece) if is_bytes else _of_piece(piece))
    _check(tokenizer, texts)
    return texts


def _of_bytes(piece: str) -> str | None:
    byte = _byte_of()
    try:
        return bytes(byte[character] for character in piece).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def _of_piece(piece: str) -> str | None:
    found = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    if found:
        code = int(found[1], 16)
        return chr(code) if code < 128 else None
    return piece.replace("▁", " ")


def _check(tokenizer: Any, texts: list[str | None]) -> None:
    """Raise ValueError if the texts of tokens do not agree with what the tokenizer decodes."""
    for probe in ('{"key": [12, true]}', "1+2=3"):
        ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if any(texts[i] is None for i in ids):
            continue  # the tokenizer cannot encode this probe
        told = "".join(texts[i] or "" for i in ids)
        want = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if told.strip() != want.strip():
            raise ValueError(
                f"tokenizer: the tokens of {want!r} were read as {told!r}, so grammars cannot be used with it; "
                "byte-level and SentencePiece vocabularies are supported"
            )
