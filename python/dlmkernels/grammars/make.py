# SPDX-License-Identifier: Apache-2.0
"""Create grammars from JSON schemas and regular expressions, compiled once per tokenizer."""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from .automaton import TokenAutomaton, why_empty
from .expression import TooLarge
from .grammar import Grammar
from .schema import OBJECT, pattern_of
from .texts import token_texts

#: Number of compiled grammars that are cached per tokenizer.
KEPT = 64


class _Compiled:
    """The texts of a tokenizer's tokens, and a cache of its most recently used grammars."""

    def __init__(self, tokenizer: Any):
        self._texts = token_texts(tokenizer)
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def grammar(self, pattern: str, name: str) -> Grammar:
        with self._lock:
            if pattern in self._kept:
                self._kept.move_to_end(pattern)
                return self._kept[pattern]
        automaton = TokenAutomaton.of(pattern, self._texts)
        if automaton.shortest < 0:
            raise ValueError(f"{name}: {why_empty(pattern, self._texts)}")
        made = Grammar(automaton, name)
        with self._lock:
            self._kept[pattern] = made
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made


_compiled: weakref.WeakKeyDictionary[Any, _Compiled] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _grammar(pattern: str, name: str, tokenizer: Any) -> Grammar:
    try:
        import interegular  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{name} needs interegular: pip install "dlmkernels[grammar]"') from error
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(f"tokenizer must be a tokenizer of transformers; got {type(tokenizer).__name__}")
    with _lock:
        if tokenizer not in _compiled:
            _compiled[tokenizer] = _Compiled(tokenizer)
        of_tokenizer = _compiled[tokenizer]
    try:
        return of_tokenizer.grammar(pattern, name)
    except TooLarge as error:
        if name == "regex":
            raise ValueError(
                f"pattern: {pattern!r:.80} is too large: {error}. Lower its repetition counts, or shorten it"
            ) from None
        raise ValueError(
            f"schema is too large: {error}. Lower maxLength or maxItems, or describe fewer values"
        ) from None


def json_schema(schema: Mapping[str, Any] | bool | str, tokenizer: Any) -> Grammar:
    """Create a constraint that makes answers JSON that satisfies a schema.

    Parameters
    ----------
    schema : dict, bool or str
        A JSON schema, or its text. The supported keywords of JSON Schema 2020-12 are: `type`, `enum`, `const`, `anyOf`,
        `allOf` with one schema, `$ref` within the schema and without recursion; `properties`, `required`,
        `additionalProperties`; `items`, `prefixItems`, `minItems`, `maxItems`; `minLength`, `maxLength`, `pattern`,
        `format` (date, time, date-time, uuid); `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum` of
        integers. Annotations such as `title` and `description` are ignored. Properties appear in the order of the
        schema; if it names any, there are no others. Values that the schema does not describe are scalars, or lists
        and objects of scalars.
    tokenizer : PreTrainedTokenizer
        Tokenizer of the model.

    Returns
    -------
    Constraint
        The value for `constraint=` of `generate` or `Engine.add_request`. Its `min_tokens` is the length of the
        shortest answer; a smaller `max_new_tokens` raises. Every completely decoded answer is valid.

    Raises
    ------
    ValueError
        If the schema is invalid, uses a keyword that is not listed here (the message names it), or describes so many
        texts that its automaton would have more than 10,000 states (each character of `maxLength` needs two).
    TypeError
        If `tokenizer` is not a tokenizer of transformers.
    ImportError
        If interegular is not installed.
    """
    found: Any = schema
    if isinstance(schema, str):
        try:
            found = json.loads(schema)
        except RecursionError as error:
            raise ValueError("schema is not valid JSON: it is nested too deeply") from error
        except ValueError as error:  # also integers of too many digits
            raise ValueError(f"schema is not valid JSON: {error}") from error
    return _grammar(pattern_of(found), "json_schema", tokenizer)


def json_object(tokenizer: Any) -> Grammar:
    """Create a constraint that makes answers JSON objects of scalars, and lists and objects of scalars.

    See `json_schema` for the parameter, the returned value and errors.
    """
    return _grammar(pattern_of(OBJECT), "json_object", tokenizer)


def regex(pattern: str, tokenizer: Any) -> Grammar:
    """Create a constraint that makes a regular expression match the whole answer.

    Parameters
    ----------
    pattern : str
        A regular expression in Python's syntax, without lookaround and backreferences.
    tokenizer : PreTrainedTokenizer
        Tokenizer of the model.

    Returns
    -------
    Constraint
        See `json_schema`.

    Raises
    ------
    ValueError
        If the pattern is not supported, or its automaton would have more than 10,000 states.
    TypeError
        If `pattern` is not a string, or `tokenizer` is not a tokenizer of transformers.
    ImportError
        If interegular is not installed.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string; got {type(pattern).__name__}")
    return _grammar(pattern, "regex", tokenizer)
