# SPDX-License-Identifier: Apache-2.0
"""Grammars from JSON schemas and regular expressions, compiled once for each tokenizer."""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from .automaton import TokenAutomaton
from .grammar import Grammar
from .schema import OBJECT, pattern_of
from .texts import token_texts

#: how many grammars are kept for each tokenizer
KEPT = 64


class _Compiled:
    """Texts of a tokenizer's tokens, and the grammars that were used last."""

    def __init__(self, tokenizer: Any):
        self._texts = token_texts(tokenizer)
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def grammar(self, pattern: str, name: str) -> Grammar:
        with self._lock:
            if pattern in self._kept:
                self._kept.move_to_end(pattern)
                return self._kept[pattern]
        made = Grammar(TokenAutomaton.of(pattern, self._texts), name)
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
        raise TypeError(f"tokenizer must be one of transformers'; got {type(tokenizer).__name__}")
    with _lock:
        if tokenizer not in _compiled:
            _compiled[tokenizer] = _Compiled(tokenizer)
        of_tokenizer = _compiled[tokenizer]
    return of_tokenizer.grammar(pattern, name)


def json_schema(schema: Mapping[str, Any] | bool | str, tokenizer: Any) -> Grammar:
    """A constraint under which answers are JSON that satisfies a schema.

    Parameters
    ----------
    schema : dict, bool or str
        A JSON schema, or its text. Of JSON Schema 2020-12: `type`, `enum`, `const`, `anyOf`, `$ref` within the schema
        and without recursion; `properties`, `required`, `additionalProperties`; `items`, `prefixItems`, `minItems`,
        `maxItems`; `minLength`, `maxLength`, `pattern`, `format` (date, time, date-time, uuid); `minimum`, `maximum`,
        `exclusiveMinimum`, `exclusiveMaximum` of integers. Properties come in the order in which the schema names
        them, and no others where it names some. Values of which it says nothing hold no more than
        scalars and lists and objects of these.
    tokenizer : PreTrainedTokenizer
        Of the model.

    Returns
    -------
    Constraint
        To be passed as `constraint=` to `generate` or `Engine.add_request`. `min_tokens` says how long the shortest
        answer is; a shorter `max_new_tokens` is refused. Each answer that is decoded whole is valid, however long.

    Raises
    ------
    ValueError
        When the schema is wrong, or says something that is not listed here. The message names it.
    ImportError
        Without interegular.
    """
    found: Any = schema
    if isinstance(schema, str):
        try:
            found = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"schema is no JSON: {error}") from error
    return _grammar(pattern_of(found), "json_schema", tokenizer)


def json_object(tokenizer: Any) -> Grammar:
    """A constraint under which answers are JSON objects of scalars, lists and maps of scalars; see `json_schema`."""
    return _grammar(pattern_of(OBJECT), "json_object", tokenizer)


def regex(pattern: str, tokenizer: Any) -> Grammar:
    """A constraint under which a regular expression matches answers as a whole.

    Parameters
    ----------
    pattern : str
        In Python's syntax, without look-around and references back.
    tokenizer : PreTrainedTokenizer
        Of the model.

    Returns
    -------
    Constraint
        See `json_schema`.

    Raises
    ------
    ValueError
        When the pattern cannot be read.
    ImportError
        Without interegular.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string; got {type(pattern).__name__}")
    return _grammar(pattern, "regex", tokenizer)
