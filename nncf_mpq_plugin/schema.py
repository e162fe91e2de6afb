"""
One table of keys, three uses: checking a parsed JSON value, JSON Schema for editors, and the reference in docs/.

A :class:`Key` says what may stand at one place of the file. ``check`` reports every problem at once, each with its
place, the offending value and the nearest valid choice.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nncf_mpq_plugin.errors import ConfigError

REQUIRED = object()

_NAMES = {
    "object": "an object",
    "map": "an object",
    "free": "an object",
    "list": "a list",
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
}


@dataclass(frozen=True)
class Key:
    """
    What may stand at one place of the file.

    :param kind: ``object`` (the keys in ``keys``), ``map`` (any names, values as ``item``), ``free`` (an object that
        is passed on unchecked), ``list`` (of ``item``), ``integer``, ``number``, ``string`` or ``boolean``.
    :param doc: what it means, one sentence or two, for the reference.
    :param default: the value where the key is absent; without one the key is required.
    :param choices: the only values allowed.
    :param minimum: smallest value (for a list: smallest length).
    :param maximum: largest value.
    :param above: value must be larger than this.
    :param unique: a list's items must differ.
    :param nullable: null is allowed.
    """

    kind: str
    doc: str
    default: Any = REQUIRED
    keys: Mapping[str, Key] = field(default_factory=dict)
    item: Key | None = None
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    unique: bool = False
    nullable: bool = False


def check(value: Any, key: Key, place: str) -> Any:
    """
    Check ``value`` against ``key`` and fill in the defaults.

    :param value: parsed JSON.
    :param place: what to call the file in messages.
    :return: a new value with every key present.
    :raises ConfigError: listing every problem found.
    """
    checker = _Checker(key)
    result = checker.check(value, key, "")
    if checker.problems:
        if len(checker.problems) == 1:
            msg = f"{place}: {checker.problems[0]}"
        else:
            msg = f"{place}: {len(checker.problems)} problems:\n" + "\n".join(f"  - {p}" for p in checker.problems)
        raise ConfigError(msg)
    return result


def nearest(word: str, known: list[str]) -> str | None:
    """:return: the entry of ``known`` that ``word`` was probably meant to be, if any."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(by_lower), n=1, cutoff=0.55)
    return by_lower[close[0]] if close else None


def describe(value: Any) -> str:
    """:return: ``value`` as it stands in the file, shortened, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Checker:
    def __init__(self, root: Key):
        self.problems: list[str] = []
        self.homes: dict[str, list[str]] = {}
        for path, _ in _walk(root, ""):
            self.homes.setdefault(path.rsplit(".", 1)[-1], []).append(path)

    def problem(self, place: str, text: str) -> None:
        self.problems.append(f"{place or 'the file'}: {text}")

    def check(self, value: Any, key: Key, place: str) -> Any:
        if value is None and key.nullable:
            return None
        if not self._is_kind(value, key, place):
            return None
        if key.kind == "object":
            return self._object(value, key, place)
        if key.kind == "map":
            assert key.item is not None
            return {name: self.check(item, key.item, f"{place}.{name}") for name, item in value.items()}
        if key.kind == "list":
            return self._list(value, key, place)
        if key.kind == "free":
            return self._free(value, place)
        if key.kind == "number":
            value = float(value)
        self._value(value, key, place)
        return value

    def _is_kind(self, value: Any, key: Key, place: str) -> bool:
        ok = {
            "integer": isinstance(value, int) and not isinstance(value, bool),
            "number": isinstance(value, int | float) and not isinstance(value, bool),
            "string": isinstance(value, str),
            "boolean": isinstance(value, bool),
            "list": isinstance(value, list),
        }.get(key.kind, isinstance(value, dict))
        if not ok:
            self.problem(place, f"expected {_NAMES[key.kind]}, got {describe(value)}.{_hint(value, key)}")
            return False
        if key.kind == "number" and (abs(value) > 1e300 or not math.isfinite(value)):
            self.problem(place, f"expected a finite number, got {describe(value)}.")
            return False
        return True

    def _object(self, value: dict[str, Any], key: Key, place: str) -> dict[str, Any]:
        for name in value:
            if name not in key.keys:
                self.problem(place, self._unknown(name, key, place))
        result = {}
        for name, inner in key.keys.items():
            here = f"{place}.{name}" if place else name
            if name in value:
                result[name] = self.check(value[name], inner, here)
            elif _is_required(inner):
                self.problem(place, f"the key {name!r} is missing ({inner.doc.rstrip('.')}).")
            elif inner.kind == "object" and inner.default is REQUIRED:
                result[name] = self.check({}, inner, here)  # an absent section is its keys' defaults
            else:
                result[name] = inner.default
        return result

    def _unknown(self, name: str, key: Key, place: str) -> str:
        close = nearest(name, list(key.keys))
        homes = [path for path in self.homes.get(name, []) if path != f"{place}.{name}"]
        if homes:
            hint = f"it belongs at {homes[0]!r}"
        elif close:
            hint = f"did you mean {close!r}?"
        elif far := nearest(name, list(self.homes)):
            hint = f"did you mean {self.homes[far][0]!r}?"
        else:
            hint = f"known here are {', '.join(sorted(key.keys))}"
        return f"unknown key {name!r}; {hint}{'' if hint.endswith('?') else '.'}"

    def _list(self, value: list[Any], key: Key, place: str) -> tuple[Any, ...]:
        assert key.item is not None
        if key.minimum is not None and len(value) < key.minimum:
            self.problem(place, f"expected at least {key.minimum:g} entries, got {describe(value)}.")
        result = tuple(self.check(item, key.item, f"{place}[{index}]") for index, item in enumerate(value))
        twice = [item for index, item in enumerate(result) if item is not None and item in result[:index]]
        if key.unique and twice:  # None: an item that was refused already
            self.problem(place, f"{describe(twice[0])} appears twice; name each value once.")
        return result

    def _free(self, value: dict[str, Any], place: str) -> Any:
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            self.problem(place, f"cannot be saved as JSON ({error}), got {describe(value)}.")
            return None

    def _value(self, value: Any, key: Key, place: str) -> None:
        if key.choices and value not in key.choices:
            if isinstance(value, str):
                close = nearest(value, list(key.choices))
                hint = f" Did you mean {describe(close)}?" if close else ""
            else:
                hint = f" The nearest is {min(key.choices, key=lambda choice: abs(choice - value))}."
            self.problem(place, f"{describe(value)} is not one of {', '.join(map(describe, key.choices))}.{hint}")
        elif key.minimum is not None and value < key.minimum:
            self.problem(place, f"must be at least {key.minimum:g}, got {describe(value)}.")
        elif key.maximum is not None and value > key.maximum:
            self.problem(place, f"must be at most {key.maximum:g}, got {describe(value)}.")
        elif key.above is not None and value <= key.above:
            self.problem(place, f"must be greater than {key.above:g}, got {describe(value)}.")


def _hint(value: Any, key: Key) -> str:
    """What the writer probably meant by a value of the wrong type."""
    if key.kind in ("integer", "number") and isinstance(value, str | float):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return ""
        if not math.isfinite(number):
            return ""
        return f" Write {round(number) if key.kind == 'integer' else value}."
    if key.kind == "boolean" and str(value).lower() in ("yes", "no", "on", "off", "true", "false", "0", "1"):
        return f" Write {'true' if str(value).lower() in ('yes', 'on', 'true', '1') else 'false'}."
    if key.kind == "list" and not isinstance(value, dict | str | type(None)):
        return f" Write [{describe(value)}]."
    return ""


def _walk(key: Key, place: str) -> Iterator[tuple[str, Key]]:
    """:return: every key below ``key`` with its path."""
    for name, inner in key.keys.items():
        here = f"{place}.{name}" if place else name
        yield here, inner
        yield from _walk(inner, here)
    if key.item is not None and key.item.keys:
        yield from _walk(key.item, place + (".*" if key.kind == "map" else "[]"))


def json_schema(key: Key) -> dict[str, Any]:
    """:return: ``key`` as JSON Schema (draft 2020-12)."""
    kinds = {"map": "object", "free": "object", "list": "array"}
    kind = kinds.get(key.kind, key.kind)
    result: dict[str, Any] = {"description": key.doc, "type": [kind, "null"] if key.nullable else kind}
    if key.default is not REQUIRED and key.kind != "object":
        result["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
    if key.kind == "object":
        result["properties"] = {name: json_schema(inner) for name, inner in key.keys.items()}
        result["additionalProperties"] = False
        required = [name for name, inner in key.keys.items() if _is_required(inner)]
        if required:
            result["required"] = required
    if key.item is not None:
        result["additionalProperties" if key.kind == "map" else "items"] = json_schema(key.item)
    if key.choices:
        result["enum"] = list(key.choices) + ([None] if key.nullable else [])
    if key.minimum is not None:
        result["minItems" if key.kind == "list" else "minimum"] = key.minimum
    if key.maximum is not None:
        result["maximum"] = key.maximum
    if key.above is not None:
        result["exclusiveMinimum"] = key.above
    if key.unique:
        result["uniqueItems"] = True
    return result


def _is_required(key: Key) -> bool:
    if key.default is not REQUIRED:
        return False
    return key.kind != "object" or any(_is_required(inner) for inner in key.keys.values())


def reference(key: Key) -> str:
    """:return: the keys as Markdown, one table for each object."""
    lines: list[str] = []

    def section(key: Key, place: str) -> None:
        lines.extend([f"## `{place}`" if place else "## Top level", "", key.doc, ""])
        lines.extend(["| key | type | default | meaning |", "|---|---|---|---|"])
        for name, inner in key.keys.items():
            default = "required" if _is_required(inner) else "" if inner.kind == "object" else _default(inner)
            lines.append(f"| `{name}` | {_kind(inner)} | {default} | {inner.doc} |")
        lines.append("")
        for name, inner in key.keys.items():
            if inner.kind == "object":
                section(inner, f"{place}.{name}" if place else name)

    section(key, "")
    return "\n".join(lines)


def _default(key: Key) -> str:
    return f"`{describe(list(key.default) if isinstance(key.default, tuple) else key.default)}`"


def _kind(key: Key) -> str:
    text = {"map": "object", "free": "object"}.get(key.kind, key.kind)
    if key.kind == "list" and key.item is not None:
        text = f"list of {_kind(key.item)}"
    elif key.kind == "map" and key.item is not None:
        text = f"object of {_kind(key.item)}"
    if key.choices:
        text = ", ".join(f"`{choice}`" for choice in key.choices)
    limits = [
        f"{sign} {bound:g}"
        for sign, bound in (("≥", key.minimum), (">", key.above), ("≤", key.maximum))
        if bound is not None and key.kind in ("integer", "number")
    ]
    return f"{text} {', '.join(limits)}".strip() + (" or null" if key.nullable else "")
