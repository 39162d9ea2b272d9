# SPDX-License-Identifier: Apache-2.0
"""What text each token of a tokenizer stands for."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (the table of GPT-2's tokenizer)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def token_texts(tokenizer: Any) -> list[str | None]:
    """The text of each token, by its id; None for special tokens and parts of a character.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        With a vocabulary of bytes (GPT-2, Llama 3, Qwen), of pieces with "▁" for spaces (SentencePiece), or of plain
        text.

    Raises
    ------
    ValueError
        When the tokens do not add up to the text that they were made of.
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
    """Refuse a tokenizer whose tokens mean something else than what was read here."""
    for probe in ('{"key": [12, true]}', "1+2=3"):
        ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if any(texts[i] is None for i in ids):
            continue  # it has no tokens for this
        told = "".join(texts[i] or "" for i in ids)
        want = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if told.strip() != want.strip():
            raise ValueError(
                f"tokenizer: the tokens of {want!r} are read as {told!r}, so that no grammar can be held with them; "
                "vocabularies of bytes and of SentencePiece can be read"
            )
