"""200 JSON Schemas of many kinds, and whether the values that they allow are of bounded length."""

import json
import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Schema = dict[str, Any]

COUNT = 200
_BOUNDED_FORMATS = {"date", "time", "date-time", "uuid", "ipv4", "ipv6"}


class Case(NamedTuple):
    """A schema, what it shows, and whether all of its values are of bounded length."""

    name: str
    schema: Schema
    is_bounded: bool


def cases(count: int = COUNT) -> list[Case]:
    """Return the hand-written schemas and random ones; of fewer, every so many of each."""
    rng = random.Random(16)
    named = {**HAND_WRITTEN}
    while len(named) < COUNT:
        named[f"random {len(named)}"] = _random_object(rng, 3)
    picked = [list(named.items())[i * COUNT // count] for i in range(count)]
    return [Case(name, schema, is_bounded(schema, schema)) for name, schema in picked]


def _object(properties: Schema, *optional: str, **more: Any) -> Schema:
    required = [name for name in properties if name not in optional]
    more = {"additionalProperties": False, **more}
    return {"type": "object", "properties": properties, "required": required, **more}


def _array(items: Any, least: int, most: int | None = None, **more: Any) -> Schema:
    limits = {"minItems": least} | ({} if most is None else {"maxItems": most})
    return {"type": "array", "items": items, **limits, **more}


WORD = {"type": "string", "maxLength": 12}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
FLAG = {"type": "boolean"}

HAND_WRITTEN: dict[str, Schema] = {
    "a boolean": FLAG,
    "null": {"type": "null"},
    "a small integer": {"type": "integer", "minimum": -12, "maximum": 12},
    "exclusive limits": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "a multiple": {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 25},
    "a negative range": {"type": "integer", "minimum": -1000, "maximum": -990},
    "any integer": {"type": "integer"},
    "any number": {"type": "number"},
    "a number of a range": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "a positive number": {"type": "number", "exclusiveMinimum": 0},
    "any string": {"type": "string"},
    "a short string": WORD,
    "a string of one length": {"type": "string", "minLength": 5, "maxLength": 5},
    "a long string": {"type": "string", "minLength": 40, "maxLength": 60},
    "an empty string": {"type": "string", "maxLength": 0},
    "a date": {"type": "string", "format": "date"},
    "a time": {"type": "string", "format": "time"},
    "a date and time": {"type": "string", "format": "date-time"},
    "a duration": {"type": "string", "format": "duration"},
    "an e-mail address": {"type": "string", "format": "email"},
    "a host": {"type": "string", "format": "hostname"},
    "an IPv4 address": {"type": "string", "format": "ipv4"},
    "an IPv6 address": {"type": "string", "format": "ipv6"},
    "a UUID": {"type": "string", "format": "uuid"},
    "a URI": {"type": "string", "format": "uri"},
    "a postal code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "a pattern within": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 30},
    "a pattern of words": {"type": "string", "pattern": "^(red|green|blue)( (red|green|blue)){2}$"},
    "a pattern of bars": {"type": "string", "pattern": r"^a\|b\\c/\"d\"$"},
    "an open pattern": {"type": "string", "pattern": "^[a-z]+$"},
    "an enumeration": {"enum": ["north", "east", "south", "west"]},
    "one of several types": {"enum": [1, "one", None, True, [1, 2], {"one": 1}]},
    "a constant": {"const": {"a": [1, {"b": None}], "c": 'ä\n"\\/'}},
    "a long enumeration": {"enum": [f"value {i}" for i in range(500)]},
    "a word or null": {"type": ["string", "null"], "maxLength": 8},
    "any of two": {"anyOf": [WORD, {"type": "integer", "minimum": 0, "maximum": 99}]},
    "one of two": {"oneOf": [_object({"kind": {"const": "a"}}), _object({"kind": {"const": "b"}})]},
    "all of two": {
        "allOf": [{"type": "integer", "minimum": 3}, {"maximum": 30}, {"multipleOf": 3}]
    },
    "all of two objects": {
        "allOf": [
            {"type": "object", "properties": {"a": FLAG}, "required": ["a"]},
            {"type": "object", "properties": {"b": DIGIT}, "required": ["b"]},
        ],
        "maxProperties": 2,
    },
    "an object": _object({"name": WORD, "age": DIGIT}),
    "optional properties": _object({"a": FLAG, "b": DIGIT, "c": WORD}, "a", "c"),
    "only optional ones": _object({"a": FLAG, "b": DIGIT}, "a", "b"),
    "no properties": _object({}),
    "any object": {"type": "object"},
    "anything": {},
    "any array": {"type": "array"},
    "odd names": _object({"": FLAG, 'a "b"': FLAG, "ключ": FLAG, "😀": FLAG, "n\nl": FLAG}),
    "names with spaces": _object({" first": WORD, "last ": WORD, "a  b": WORD}),
    "a map": {"type": "object", "additionalProperties": DIGIT, "maxProperties": 3},
    "a map of a pattern": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": FLAG},
        "additionalProperties": False,
    },
    "required but not described": {"type": "object", "required": ["a", "b"]},
    "an array": _array(DIGIT, 1, 4),
    "an empty array": _array(True, 0, 0),
    "a tuple": {"type": "array", "prefixItems": [WORD, DIGIT, FLAG], "items": False, "minItems": 3},
    "an open tuple": {"type": "array", "prefixItems": [DIGIT], "items": FLAG, "maxItems": 3},
    "a matrix": _array(_array(DIGIT, 2, 2), 2, 2),
    "an open array": _array(DIGIT, 2),
    "an array of objects": _array(_object({"id": DIGIT, "tags": _array(WORD, 0, 2)}), 1, 3),
    "deep": _object({"a": _object({"b": _object({"c": _object({"d": _array(FLAG, 1, 1)})})})}),
    "a definition": {
        **_object({"home": {"$ref": "#/$defs/place"}, "work": {"$ref": "#/$defs/place"}}),
        "$defs": {"place": _object({"x": DIGIT, "y": DIGIT})},
    },
    "a tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": _object({"value": DIGIT, "children": _array({"$ref": "#/$defs/node"}, 0, 2)})
        },
    },
    "a list of links": {
        **_object({"value": DIGIT, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}),
    },
    "as pydantic writes it": {
        "title": "Person",
        "description": "A person.",
        **_object(
            {
                "name": {"title": "Name", **WORD},
                "email": {"anyOf": [{"maxLength": 9, "type": "string"}, {"type": "null"}]},
                "role": {"$ref": "#/$defs/Role", "default": "user", "examples": ["admin"]},
            },
            "role",
        ),
        "$defs": {"Role": {"enum": ["admin", "user"], "title": "Role", "type": "string"}},
    },
    "a discriminated union": _array(
        {
            "anyOf": [
                _object({"type": {"const": "circle"}, "radius": DIGIT}),
                _object({"type": {"const": "square"}, "side": DIGIT}),
            ]
        },
        1,
        2,
    ),
    "a call": _object(
        {
            "name": {"const": "get_weather"},
            "arguments": _object({"city": WORD, "unit": {"enum": ["C", "F"]}}),
        }
    ),
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"n": DIGIT},
        **_object({"n": {"$ref": "#/definitions/n"}}),
    },
}


def _random_object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "größe", "is_open", "x-y", "items", "note", "a.b"], 4)
    properties = {name: _random(rng, depth - 1) for name in names[: rng.randint(1, 4)]}
    optional = [name for name in properties if rng.random() < 0.3]
    schema = _object(properties, *optional)
    if rng.random() < 0.1:
        schema["additionalProperties"] = rng.choice([DIGIT, FLAG])
    return schema


def _random(rng: random.Random, depth: int) -> Schema:
    if depth > 0 and rng.random() < 0.45:
        kind = rng.choice(["object", "array", "any of", "tuple"])
        if kind == "object":
            return _random_object(rng, depth)
        if kind == "array":
            least = rng.randint(0, 2)
            return _array(_random(rng, depth - 1), least, least + rng.randint(0, 2))
        if kind == "tuple":
            items = [_random(rng, depth - 1) for _ in range(rng.randint(1, 3))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        return {"anyOf": [_random(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
    low = rng.randint(-200, 200)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
            {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 16)},
            {
                "type": "string",
                "pattern": rng.choice(["^[a-f]{4}$", "^[0-9]{2}:[0-9]{2}$", "^v[0-9]$"]),
            },
            {"type": "string", "format": rng.choice(["date", "uuid", "ipv4"])},
            {
                "enum": rng.sample(
                    ["red", "green", "light blue", "ß", 7, None, 2.5], rng.randint(1, 4)
                )
            },
            {"type": ["boolean", "null"]},
            {"const": rng.choice(["x", 0, -1.5, False, ["a", {"b": 1}]])},
            {"type": "number", "minimum": 0, "maximum": 1},
        ]
    )


def is_bounded(schema: Any, root: Schema, seen: tuple[str, ...] = ()) -> bool:
    """Return whether all values of a schema of this file are of bounded length."""
    if schema is False:
        return True
    if not isinstance(schema, Mapping):
        return False
    if "enum" in schema or "const" in schema:
        return True
    if "$ref" in schema:
        ref = schema["$ref"]
        return ref not in seen and is_bounded(_resolved(ref, root), root, (*seen, ref))
    for word, decides in (("anyOf", all), ("oneOf", all), ("allOf", any)):
        if word in schema:
            return decides(is_bounded(each, root, seen) for each in schema[word])
    types = schema.get("type", "anything")
    types = types if isinstance(types, list) else [types]
    return all(_is_bounded_type(kind, schema, root, seen) for kind in types)


def _is_bounded_type(kind: str, schema: Mapping[str, Any], root: Schema, seen: Any) -> bool:
    keys = schema.keys()
    if kind == "integer":
        return bool(
            keys & {"minimum", "exclusiveMinimum"} and keys & {"maximum", "exclusiveMaximum"}
        )
    if kind == "string":
        pattern = schema.get("pattern", "+")
        ends = pattern[0] == "^" and pattern[-1] == "$" and not re.search(r"[*+]|,\}", pattern)
        return "maxLength" in keys or ends or schema.get("format") in _BOUNDED_FORMATS
    if kind == "array":
        rest = schema.get("items", True)
        ends = rest is False or "maxItems" in keys
        items = [*schema.get("prefixItems", ()), *([rest] if schema.get("maxItems") != 0 else ())]
        return ends and all(is_bounded(each, root, seen) for each in items)
    if kind == "object":
        rest = schema.get("additionalProperties", True)
        inner = [*schema.get("properties", {}).values(), rest]
        ends = "maxProperties" in keys or (rest is False and "patternProperties" not in keys)
        has_names = rest is False  # names that a schema doesn't list are of any length
        return ends and has_names and all(is_bounded(each, root, seen) for each in inner)
    return kind in ("boolean", "null")


def _resolved(ref: str, root: Schema) -> Any:
    found: Any = root
    for name in ref.removeprefix("#").split("/")[1:]:
        found = found[name]
    return found


def is_compact(text: str) -> bool:
    """Return whether JSON has no white space between its tokens."""
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    return not re.search(r"\s", outside)


def validated(text: str, schema: Schema) -> str:
    """Return what is wrong with an answer, "" for nothing."""
    from jsonschema import Draft202012Validator

    try:
        value = json.loads(text)
    except ValueError as error:
        return f"it doesn't parse: {error}"
    checker = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    errors = [error.message for error in checker.iter_errors(value)]
    return errors[0] if errors else "" if is_compact(text) else "it isn't compact"
