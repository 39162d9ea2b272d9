# SPDX-License-Identifier: Apache-2.0
"""Convert JSON schemas to regular expressions. Unsupported keywords are rejected by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .expression import LONGEST, WORK, TooLarge, automaton_of
from .numbers import DIGITS, integers

CHARACTER = r'(?:[^"\\\x00-\x1f\x7f-\x9f]|\\["\\/bfnrt])'
STRING = f'"{CHARACTER}*"'
INTEGER = "-?(?:0|[1-9][0-9]{0,17})"
NUMBER = rf"{INTEGER}(?:\.[0-9]{{1,17}})?(?:[eE][+-]?[0-9]{{1,2}})?"
DAY = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
DATE, TIME = f"[0-9]{{4}}-{DAY}", "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]Z"
FORMATS = {
    "date": DATE, "time": TIME, "date-time": f"{DATE}T{TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}  # fmt: skip
#: Nesting depth of values that a schema does not describe.
DEPTH = 1
#: Maximum nesting depth of schemas.
DEEPEST = 32
#: Maximum number of subschemas, each counted as often as it is referenced.
MOST_SCHEMAS = 20_000
#: Maximum number of digits of an integer's bound.
MOST_DIGITS = 100
LARGEST = 10**MOST_DIGITS
#: Characters that JSON strings must escape.
ESCAPED = '"\\' + "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
COMMA = ", ?"
OBJECT = {"type": "object"}

NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions",
         "deprecated", "readOnly", "writeOnly"}  # fmt: skip
WORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set(), "boolean": set(), "null": set(),
}  # fmt: skip
OF_TYPE = {word: kind for kind, words in WORDS.items() for word in words}


def pattern_of(schema: Mapping[str, Any] | bool) -> str:
    """Return the regular expression that matches the values of a schema.

    Raises
    ------
    ValueError
        If the schema is invalid or not supported.
    """
    return _Reader(schema).value(schema, "schema", ())


def literal(text: str) -> str:
    """Return the regular expression that matches a literal text."""
    return "".join(f"\\{c}" if c in r"\.^$*+?{}[]|()/-" else c for c in text)


def _any(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _anything(depth: int) -> str:
    """Return the expression for values of any type, nested at most `depth` deep."""
    scalars = [STRING, NUMBER, "true", "false", "null"]
    return _any([*scalars, _array(_anything(depth - 1)), _map(_anything(depth - 1))] if depth else scalars)


def _array(item: str) -> str:
    return rf"\[(?:{item}(?:{COMMA}{item})*)?\]"


def _map(value: str) -> str:
    pair = f"{STRING}: ?{value}"
    return rf"\{{(?:{pair}(?:{COMMA}{pair})*)?\}}"


class _Reader:
    """Converts one schema. In its methods, `place` is the path within the schema, for error messages."""

    def __init__(self, root: Any):
        self.root = root
        self.count = self.work = 0

    def value(self, schema: Any, place: str, refs: tuple[str, ...], depth: int = 0) -> str:
        self.count += 1
        if self.count > MOST_SCHEMAS:
            raise ValueError(
                f"schema is too large: with its references followed, it has over {MOST_SCHEMAS} subschemas"
            )
        pattern = self._value(schema, place, refs, depth)
        if len(pattern) > LONGEST:
            raise ValueError(
                f"schema is too large: the regular expression of {place:.200} has {len(pattern)} characters; at most "
                f"{LONGEST} are possible"
            )
        return pattern

    def _value(self, schema: Any, place: str, refs: tuple[str, ...], depth: int) -> str:
        if depth > DEEPEST:
            raise ValueError(f"{place}: schemas must not be nested more than {DEEPEST} deep")
        if schema is True:
            return _anything(DEPTH)
        if not isinstance(schema, Mapping):
            raise ValueError(f"{place} must be an object or true; got {schema!r:.80}")
        strange = [word for word in schema if not isinstance(word, str)]
        if strange:
            raise ValueError(f"{place}: keywords must be strings; got {strange[0]!r:.80}")
        words = {word for word in schema if word not in NOTES}
        for word, read in (("$ref", self._ref), ("anyOf", self._any_of), ("allOf", self._all_of)):
            if word in words:
                if words != {word}:
                    raise ValueError(f"{place}: {word} cannot be combined with {', '.join(sorted(words - {word}))}")
                return read(schema[word], f"{place}.{word}", refs, depth + 1)
        kinds = self._kinds(schema, words, place)
        if "const" in words or "enum" in words:
            return self._listed(schema, words, kinds, place)
        known = {"type"}.union(*(WORDS[kind] for kind in kinds or WORDS))
        if words - known:
            more = sorted(words - known)
            noun = "keyword" if len(more) == 1 else "keywords"
            raise ValueError(f"{place}: unsupported {noun} {', '.join(more)} (see json_schema)")
        if kinds is None:
            return _anything(DEPTH)
        return _any([getattr(self, f"_{kind}")(schema, place, refs, depth) for kind in kinds])

    # --- types and fixed values ---------------------------------------------------------------------------------------

    @staticmethod
    def _kinds(schema: Mapping[str, Any], words: set[str], place: str) -> list[str] | None:
        """Return the types that a schema names or that its keywords imply; None means any type."""
        kinds = schema.get("type")
        if kinds is None:
            return sorted({OF_TYPE[word] for word in words if word in OF_TYPE}) or None
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds or not all(isinstance(k, str) and k in WORDS for k in kinds):
            raise ValueError(f"{place}.type must be one or more of {', '.join(WORDS)}; got {schema['type']!r:.80}")
        return kinds

    @staticmethod
    def _listed(schema: Mapping[str, Any], words: set[str], kinds: list[str] | None, place: str) -> str:
        if words - {"type", "const", "enum"}:
            raise ValueError(
                f"{place}: {', '.join(sorted(words - {'type', 'const', 'enum'}))} cannot be combined with const or enum"
            )
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list) or not values:
            raise ValueError(f"{place}.enum must be a non-empty list of values; got {values!r:.80}")
        for word, value in (("const", schema.get("const")), *(("enum", value) for value in values)):
            _check_json(value, f"{place}.{word}" if word in words else f"{place}.const")
        if "const" in words:
            values = [value for value in values if _same(value, schema["const"])]
        values = [value for value in values if kinds is None or any(_is(value, kind) for kind in kinds)]
        if not values:
            raise ValueError(f"{place}: const, enum and type have no value in common")
        return _any([literal(json.dumps(value, ensure_ascii=False)) for value in values])

    def _ref(self, name: Any, place: str, refs: tuple[str, ...], depth: int) -> str:
        if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
            raise ValueError(f"{place} must be '#' or '#/…', which point into this schema; got {name!r:.80}")
        if name in refs:
            raise ValueError(
                f"{place}: {name} contains itself, but recursive schemas are not supported: write out the levels needed"
            )
        found = self.root
        for step in name[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or step not in found:
                raise ValueError(f"{place}: there is no {name} in the schema")
            found = found[step]
        return self.value(found, name, (*refs, name), depth)

    def _any_of(self, options: Any, place: str, refs: tuple[str, ...], depth: int) -> str:
        if not isinstance(options, list) or not options:
            raise ValueError(f"{place} must be a non-empty list of schemas; got {options!r:.80}")
        return _any([self.value(one, f"{place}[{k}]", refs, depth) for k, one in enumerate(options)])

    def _all_of(self, options: Any, place: str, refs: tuple[str, ...], depth: int) -> str:
        if not isinstance(options, list) or len(options) != 1:
            raise ValueError(f"{place} must be a list of exactly one schema; got {options!r:.80}")
        return self.value(options[0], f"{place}[0]", refs, depth)

    # --- one type each ------------------------------------------------------------------------------------------------

    def _object(self, schema: Mapping[str, Any], place: str, refs: tuple[str, ...], depth: int) -> str:
        named, required = schema.get("properties", {}), schema.get("required", [])
        more = schema.get("additionalProperties", True)
        if not isinstance(named, Mapping):
            raise ValueError(f"{place}.properties must be an object; got {named!r:.80}")
        strange = [name for name in named if not isinstance(name, str)]
        if strange:
            raise ValueError(f"{place}.properties must have strings as names; got {strange[0]!r:.80}")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"{place}.required must be a list of names; got {required!r:.80}")
        unknown = [name for name in required if name not in named]
        if unknown and more is False:
            raise ValueError(f"{place}.required names {unknown[0]!r}, which is not in properties")
        named = dict(named) | dict.fromkeys(unknown, more)
        if not named:
            if more is False:
                return r"\{\}"
            return _map(_anything(DEPTH) if more is True else self._inner(more, place, refs, depth))
        pairs = [
            (f"{literal(json.dumps(name, ensure_ascii=False))}: ?{self._inner(one, f'{place}.{name}', refs, depth)}",
             name in required)
            for name, one in named.items()
        ]  # fmt: skip
        return rf"\{{{_sequence(pairs)}\}}"

    def _inner(self, schema: Any, place: str, refs: tuple[str, ...], depth: int) -> str:
        return self.value(schema, place, refs, depth + 1)

    def _array(self, schema: Mapping[str, Any], place: str, refs: tuple[str, ...], depth: int) -> str:
        low, high = _range(schema, "minItems", "maxItems", place)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise ValueError(f"{place}.prefixItems must be a list of schemas; got {first!r:.80}")
        begun = [self._inner(one, f"{place}.prefixItems[{k}]", refs, depth) for k, one in enumerate(first)]
        rest = schema.get("items", True)
        if rest is False:
            high = len(begun) if high is None else min(high, len(begun))
        item = "" if rest is False else self._inner(rest, f"{place}.items", refs, depth)
        if high is not None and low > high:
            raise ValueError(f"{place}: no array has at least {low} and at most {high} items")
        if high == 0:
            return r"\[\]"
        if not begun:
            more = f"(?:{COMMA}{item}){{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
            whole = f"{item}{more}"
            return rf"\[{whole}\]" if low else rf"\[(?:{whole})?\]"
        begun = begun if high is None else begun[:high]
        left, most = max(low - len(begun), 0), None if high is None else high - len(begun)
        tail = "" if most == 0 or not item else f"(?:{COMMA}{item}){{{left},{'' if most is None else most}}}"
        for k in reversed(range(1, len(begun))):
            tail = f"{COMMA}{begun[k]}{tail}" if k < low else f"(?:{COMMA}{begun[k]}{tail})?"
        whole = f"{begun[0]}{tail}"
        return rf"\[{whole}\]" if low else rf"\[(?:{whole})?\]"

    def _string(self, schema: Mapping[str, Any], place: str, refs: tuple[str, ...], depth: int) -> str:
        low, high = _range(schema, "minLength", "maxLength", place)
        shapes = [word for word in ("pattern", "format") if word in schema]
        if not shapes:
            return f'"{CHARACTER}{{{low},{"" if high is None else high}}}"'
        if len(shapes) > 1 or low or high is not None:
            raise ValueError(f"{place}: {shapes[0]} cannot be combined with minLength, maxLength, pattern or format")
        if "format" in schema:
            if not isinstance(schema["format"], str) or schema["format"] not in FORMATS:
                raise ValueError(f"{place}.format must be one of {', '.join(FORMATS)}; got {schema['format']!r:.80}")
            return f'"{FORMATS[schema["format"]]}"'
        pattern, work = _safe_pattern(schema["pattern"], f"{place}.pattern")
        self.work += work
        if self.work > WORK:
            raise ValueError("schema is too large: its patterns together take too long to compile")
        return f'"{pattern}"'

    @staticmethod
    def _integer(schema: Mapping[str, Any], place: str, refs: tuple[str, ...], depth: int) -> str:
        bounds: list[int | None] = []
        for word, exclusive, step in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
            found = []
            for name, shift in ((word, 0), (exclusive, step)):
                if name in schema:
                    bound = schema[name]
                    if not isinstance(bound, int) or isinstance(bound, bool):
                        raise ValueError(f"{place}.{name}: bounds of an integer must be integers; got {bound!r:.80}")
                    if abs(bound) >= LARGEST:
                        raise ValueError(f"{place}.{name} must have at most {MOST_DIGITS} digits; got more")
                    found.append(bound + shift)
            bounds.append((max if step > 0 else min)(found) if found else None)
        low, high = bounds
        most = 10**DIGITS - 1
        if (-most if low is None else low) > (most if high is None else high):
            raise ValueError(f"{place}: {_no_integer(low, high)}")
        return INTEGER if low is None and high is None else integers(low, high)

    @staticmethod
    def _number(schema: Mapping[str, Any], place: str, refs: tuple[str, ...], depth: int) -> str:
        return NUMBER

    @staticmethod
    def _boolean(schema: Mapping[str, Any], place: str, refs: tuple[str, ...], depth: int) -> str:
        return "(?:true|false)"

    @staticmethod
    def _null(schema: Mapping[str, Any], place: str, refs: tuple[str, ...], depth: int) -> str:
        return "null"


def _sequence(pairs: Sequence[tuple[str, bool]]) -> str:
    """Return the expression for properties in their order, with commas between those that are present."""

    def onward(k: int) -> str:
        return "".join(f"{COMMA}{pair}" if needed else f"(?:{COMMA}{pair})?" for pair, needed in pairs[k:])

    first = next((k for k, (_, needed) in enumerate(pairs) if needed), None)
    if first is not None:
        before = "".join(f"(?:{pair}{COMMA})?" for pair, _ in pairs[:first])
        return f"{before}{pairs[first][0]}{onward(first + 1)}"
    return f"(?:{'|'.join(pair + onward(k + 1) for k, (pair, _) in enumerate(pairs))})?"


def _range(schema: Mapping[str, Any], least: str, most: str, place: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for word, bound in ((least, low), (most, high)):
        if word in schema and (not isinstance(bound, int) or isinstance(bound, bool) or not 0 <= bound <= 4096):
            raise ValueError(f"{place}.{word} must be an integer from 0 to 4096; got {bound!r:.80}")
    if high is not None and low > high:
        raise ValueError(f"{place}: {least} must be at most {most}; got {low} and {high}")
    return low, high


def _safe_pattern(pattern: Any, place: str) -> tuple[str, int]:
    """Convert a `pattern` to one for the inside of a JSON string, after checking that it cannot end the string.

    Also returns the effort of that check, in the units of `WORK`.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"{place} must be a string; got {pattern!r:.80}")
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inside = f"(?:{pattern[begins : len(pattern) - ends]})"
    try:
        automaton = automaton_of(inside)
    except TooLarge as error:
        raise ValueError(f"{place}: {pattern!r:.80} is too large: {error}") from None
    except ValueError as error:
        reason = str(error).partition(" regular expression: ")[2]
        raise ValueError(f"{place}: {pattern!r:.80} is not a supported regular expression: {reason}") from error
    if automaton.can_contain(ESCAPED):
        raise ValueError(
            f"{place}: {pattern!r:.80} can match a quotation mark, a backslash or a control character, which JSON "
            r'must escape: use [^"\\\x00-\x1f\x7f-\x9f] instead of a dot'
        )
    rest = f"{CHARACTER}*"
    return f"{'' if begins else rest}{inside}{'' if ends else rest}", automaton.work


def _no_integer(low: int | None, high: int | None) -> str:
    if low is None:
        return f"without a minimum, integers have at most {DIGITS} digits, so none is at most {high}"
    if high is None:
        return f"without a maximum, integers have at most {DIGITS} digits, so none is at least {low}"
    return f"no integer is at least {low} and at most {high}"


def _check_json(value: Any, place: str) -> None:
    """Raise ValueError unless a value can be written as JSON and read back."""
    try:
        written = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        written = None if value is not None else 0
    if written != value:
        is_long = isinstance(value, int) and abs(value) >= LARGEST
        shown = "an integer of too many digits" if is_long else f"{value!r:.80}"
        raise ValueError(f"{place} must be a JSON value; got {shown}")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    types: dict[str, Any] = {"integer": int, "number": (int, float), "string": str, "array": list, "object": Mapping}
    return value is None if kind == "null" else kind in types and isinstance(value, types[kind])


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other
