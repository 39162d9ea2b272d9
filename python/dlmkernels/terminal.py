# SPDX-License-Identifier: Apache-2.0
"""Output on terminals and pipes that cannot show every character."""

from __future__ import annotations

import codecs
from typing import TextIO

#: Replacements for characters that the output's encoding lacks.
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
    """Make a stream write unencodable characters as plain ones or escapes, instead of raising an error."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="dlmkernels.plain")
