# SPDX-License-Identifier: Apache-2.0
"""Output on terminals and pipes that cannot show every character."""

from __future__ import annotations

import codecs
from typing import TextIO

#: what stands for a character that the output's encoding lacks
PLAIN = str.maketrans({
    "…": "...", "–": "-", "—": "-", "·": ".", "×": "x", "│": "|", "─": "-", "┼": "+", "▶": ">", "“": '"', "”": '"',
    "‘": "'", "’": "'",
})  # fmt: skip


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode(error.encoding, "backslashreplace").decode(error.encoding), error.end


codecs.register_error("dlmkernels.plain", _plain)


def make_printable(stream: TextIO) -> None:
    """Let a stream write what its encoding lacks in plain characters, or as escapes, where it would raise."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="dlmkernels.plain")
