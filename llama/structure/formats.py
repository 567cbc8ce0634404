"""From ``response_format`` to a grammar of llguidance, and from its errors to ours."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama.errors import need, printable, short

_FORMS = "text, json_object, json_schema, regex, choice, grammar"
_MAX_BYTES = 1 << 20  # of a form
# Without forced tokens: every piece that goes on rightly may be drawn, as the model prefers.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_NAMES = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_VALUES = {"enum", "const", "default", "examples"}
_OUR_KEYS = {"json_schema", "schema", "strict", "name"}
# Dates and times as all readers take them (RFC 3339, section 5.6): days that exist, no second 60,
# and fractions of a second that end.
_LEAP = "0[48]|[2468][048]|[13579][26]"
_DATE = (
    "(([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    "|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|([0-9]{{2}}({_LEAP})|({_LEAP})00)-02-29)"
)
_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_CLOCK})"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
# What grammars can't hold an answer to; other keywords that llguidance lacks are errors.
_LENIENT = {"uniqueItems"}
# llguidance's words for the keywords that it finds fault with.
_FAULTS = (
    (r"regex|look-?around|pattern", ("pattern", "patternProperties", "regex", "format")),
    (r"integer range|number range|numeric", ("minimum", "maximum", "exclusiveMinimum")),
    (r"multiple", ("multipleOf",)),
    (r"Resource|Pointer|\bref\b|\$ref|NoExtension", ("$ref",)),
    (r"[Ii]nvalid type|incompatible types", ("type",)),
    (r"anyOf is empty", ("anyOf", "oneOf", "enum")),
    (r"min/?max ?Properties|Properties", ("minProperties", "maxProperties")),
)


def grammar_of(response_format: Mapping[str, Any]) -> str | None:
    """Return the grammar that llguidance compiles; None for a text of any form.

    Raises:
        ImportError: llguidance is missing.
        ValueError: the form is none that is known.
    """
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _json_grammar({"type": "object"})
    if kind == "json_schema":
        return _json_grammar(_schema(response_format))
    if kind == "choice":
        return _lark_grammar("start: " + " | ".join(map(_literal, _choices(response_format))))
    if kind == "regex":
        pattern = _text(response_format, "regex", "pattern")
        llguidance = need("llguidance", "structure", "response_format")
        return _lark_grammar(f"start: REGEX\nREGEX: /{llguidance.regex_to_lark(pattern, 'd')}/")
    if kind == "grammar":
        return _lark_grammar(_lark(response_format))
    raise ValueError(f"response_format has the type {short(kind)}: expected one of {_FORMS}")


def _lark_grammar(text: str) -> str:
    _check_size(text)
    return json.dumps({"grammars": [{"lark_grammar": text + _OPTIONS}]})


def _json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of a JSON Schema: compact, as models write it to machines."""
    options = {"whitespace_flexible": False, "lenient": True}
    try:
        # The order of keys is that of the answer's properties.
        schema = _with_patterns({k: v for k, v in schema.items() if k != "x-guidance"})
        text = json.dumps({**schema, "x-guidance": options}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"response_format's schema is no JSON: {error}") from error
    _check_size(text)
    body = {"name": "body", "json_schema": json.loads(text)}
    return json.dumps({"grammars": [{"lark_grammar": f"start: @body{_OPTIONS}"}, body]})


def _with_patterns(value: Any, are_names: bool = False) -> Any:
    """Return a schema with our patterns of dates and times.

    Args:
        value: the schema, or a part of it.
        are_names: whether the keys of ``value`` are names of properties or definitions.
    """
    if isinstance(value, list | tuple):
        return [_with_patterns(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    found = {
        key: each
        if key in _VALUES and not are_names
        else _with_patterns(each, key in _NAMES and not are_names)
        for key, each in value.items()
    }
    pattern = None if are_names or "pattern" in found else _PATTERNS.get(str(found.get("format")))
    if pattern:
        del found["format"]
        found["pattern"] = pattern
    return found


def _check_size(text: str) -> None:
    if len(text) > _MAX_BYTES:
        raise ValueError(
            f"response_format has {len(text):,} bytes: expected {_MAX_BYTES:,} at most"
        )


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = response_format.get("json_schema", response_format)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise ValueError(
            f"response_format has the schema {short(schema)}: expected an object, as in "
            "{'type': 'json_schema', 'json_schema': {'schema': {'type': 'object'}}}"
        )
    return schema


def _text(response_format: Mapping[str, Any], *names: str) -> str:
    """Return the text that stands under one of the names."""
    text = next((response_format[name] for name in names if name in response_format), None)
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"response_format of the type {response_format['type']} has {names[0]} = "
            f"{short(text)}: expected a string that is not empty"
        )
    return text


def _choices(response_format: Mapping[str, Any]) -> Sequence[str]:
    choices = response_format.get("choice")
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise ValueError(f"response_format has choice = {short(choices)}: expected some strings")
    if not all(isinstance(text, str) for text in choices):
        raise ValueError(f"response_format has choice = {short(choices)}: expected strings only")
    return choices


def _literal(text: str) -> str:
    """Return a text as Lark's strings have it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")  # no character there


def _lark(response_format: Mapping[str, Any]) -> str:
    """Return a grammar in Lark's notation, converted from GBNF if it is in that."""
    text = _text(response_format, "grammar")
    syntax = response_format.get("syntax")
    if syntax is None:
        syntax = "gbnf" if re.search(r"(?m)^\s*[\w-]+\s*::=", text) else "lark"
    if syntax not in ("lark", "gbnf"):
        raise ValueError(f"response_format has the syntax {short(syntax)}: expected lark or gbnf")
    if syntax == "lark":
        return text
    convert = need("llguidance.gbnf_to_lark", "structure", "response_format").gbnf_to_lark
    try:
        lark: str = convert(text)
    except Exception as error:  # of several types, bare ones too
        raise ValueError(f"the GBNF grammar is wrong: {printable(str(error), 200)}") from error
    return lark


def check_warnings(warnings: Sequence[str]) -> tuple[str, ...]:
    """Return the keywords that a grammar lets pass without holding the answer to them.

    Raises:
        ValueError: they include some whose neglect would mislead.
    """
    unenforced: dict[str, None] = {}
    for warning in warnings:
        name, _, rest = warning.partition(": ")
        if name == "Unimplemented keys":
            keys = json.loads(rest)
            missing = [key for key in keys if key not in _LENIENT]
            if missing:
                raise ValueError(
                    f"{', '.join(map(repr, missing))} can't be enforced: leave it out, and check "
                    "the answer yourself"
                )
            unenforced |= dict.fromkeys(keys)
        elif name == "Unknown format":
            unenforced[f"format {rest}"] = None
        elif "oneOf" in warning:
            unenforced["oneOf"] = None
        else:
            unenforced[printable(warning)] = None
    return tuple(unenforced)


def unchecked(response_format: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keywords that a grammar holds answers to, except where keys repeat."""
    if response_format.get("type") != "json_schema":
        return ()
    return ("minProperties",) * any("minProperties" in node for node in _nodes(response_format))


def fault(error: str, response_format: Mapping[str, Any]) -> str:
    """Return the message for a form that llguidance can't compile; it names the keyword."""
    is_grammar = response_format.get("type") == "grammar"  # whose words aren't keywords
    nodes = [] if is_grammar else _nodes(response_format)
    present = {key for node in nodes for key in node} - _OUR_KEYS
    named = list(present & set(re.findall(r"[\w$]+", error)))
    for words, keywords in _FAULTS:
        if not named and re.search(words, error):
            named = [key for key in keywords if key in present]
    place = f", at {' or '.join(map(repr, sorted(named)))}" if named else ""
    error = error.replace("NoExtensionBias", "no text that ends fits it")
    # Without a quotation of our own, or llguidance's traceback.
    reason = " ".join(re.split(r"\n *\d+ \||<(?:backtrace|non-verbose)", error)[0].split())
    return f"response_format can't be compiled{place}: {printable(reason, 300)}"


def _nodes(value: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _nodes(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _nodes(inner)
