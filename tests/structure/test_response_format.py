"""Every form of response_format allows its texts and no others; errors say what is wrong."""

import logging
import time
from typing import Any

import pytest

from llama import Llama, Tokenizer
from llama.structure import compile_format
from llama.structure.formats import fault, grammar_of

GBNF = 'root ::= "x" digit+ ("," digit+)*\ndigit ::= [0-9]'
LARK = 'start: "x" /[0-9]+/ ("," /[0-9]+/)*'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def accepts(tokenizer: Tokenizer, form: dict[str, Any], text: str) -> bool:
    """Return whether a text is an answer of the form, and may end there."""
    grammar = compile_format(form, tokenizer, tokenizer.stop_ids, in_context=True)
    assert grammar is not None
    ids = tokenizer.encode_infilling(text)
    if grammar.accepted(ids) < len(ids):
        return False
    mask = grammar.masks(ids)[-1]
    return bool(int(mask[tokenizer.eos_id // 32]) >> tokenizer.eos_id % 32 & 1)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ({"type": "json_object"}, ['{"a":[1,null]}', "{}"], ["[]", "1", '{"a": 1}', "{", ""]),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
            ['{"a":12}', '{"a":1,"b":"c"}'],
            ['{"a":1.5}', "{}", '{"b":1,"a":1}'],
        ),
        ({"type": "json_schema", "schema": {"const": "é\n"}}, ['"é\\n"'], ['"e"']),
        ({"type": "json_schema", "json_schema": {"schema": True}}, ["[1]", '"a"'], ["x"]),
        ({"type": "regex", "regex": r"a/b|[0-9]{2}"}, ["a/b", "12"], ["a", "1", "123"]),
        ({"type": "regex", "pattern": "é+"}, ["éé"], ["", "e"]),
        ({"type": "choice", "choice": ['a\x7f"']}, ['a\x7f"'], ["a"]),
        (
            {"type": "choice", "choice": ["yes", "no", "", "yes!", 'a"\\\n/😀', " b"]},
            ["yes", "no", "", "yes!", 'a"\\\n/😀', " b"],
            ["y", "b", "yes!!"],
        ),
        ({"type": "grammar", "grammar": LARK}, ["x1", "x12,3"], ["x", "x1,"]),
        ({"type": "grammar", "grammar": GBNF}, ["x1", "x12,3"], ["x", "x1,"]),
        ({"type": "grammar", "grammar": GBNF, "syntax": "gbnf"}, ["x1"], ["x"]),
        (
            {"type": "grammar", "grammar": '%llguidance {}\nstart: "::= root"'},
            ["::= root"],
            ["root"],
        ),
    ],
)
def test_forms(
    tiny_tokenizer: Tokenizer, form: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not accepts(tiny_tokenizer, form, text)] == []
    assert [text for text in wrong if accepts(tiny_tokenizer, form, text)] == []


DATES = {
    "date": (
        ["2023-02-28", "2024-02-29", "2000-02-29", "0001-12-31"],
        ["2023-02-29", "1900-02-29", "0000-01-01", "2023-04-31", "2023-13-01", "2023-1-1"],
    ),
    "time": (["00:00:00Z", "23:59:59.123456+01:30"], ["24:00:00Z", "12:00:60Z", "12:00:00"]),
    "date-time": (["2024-02-29T12:30:00-08:00"], ["2023-02-29T12:30:00Z", "2024-02-29 12:30:00Z"]),
    "uuid": (["12345678-1234-1234-1234-123456789abc"], ["12345678"]),
    "ipv4": (["1.2.3.255"], ["1.2.3.256"]),
}


@pytest.mark.parametrize("name", DATES)
def test_formats_of_strings(tiny_tokenizer: Tokenizer, name: str) -> None:
    right, wrong = DATES[name]
    # A property may have the name of a keyword, and a value may look like a schema.
    value = {"const": {"format": name}}
    properties = {"format": {"type": "string", "format": name}, "v": value}
    form = {"type": "json_schema", "schema": {"type": "object", "properties": properties}}
    for text in [*right, *wrong]:
        answer = f'{{"format":"{text}","v":{{"format":"{name}"}}}}'
        assert accepts(tiny_tokenizer, form, answer) == (text in right), text


def test_no_form(tiny_tokenizer: Tokenizer) -> None:
    assert compile_format({"type": "text"}, tiny_tokenizer, [2], in_context=False) is None


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({}, "type None: expected one of text, json_object"),
        ({"type": "xml"}, "'xml'"),
        ({"type": "json_schema"}, "schema None: expected an object"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema None"),
        ({"type": "json_schema", "schema": False}, "schema False"),
        ({"type": "json_schema", "schema": {"a": {1}}}, "no JSON: .*set"),
        ({"type": "json_schema", "schema": {"const": float("nan")}}, "no JSON"),
        ({"type": "json_schema", "schema": {"enum": ["a" * 2_000_000]}}, "1,048,576 at most"),
        ({"type": "regex"}, "regex = None: expected a string"),
        ({"type": "regex", "regex": "("}, "at 'regex': .*unclosed group"),
        ({"type": "regex", "regex": "(?=a)b"}, "look-around"),
        ({"type": "choice", "choice": []}, r"choice = \[\]: expected some strings"),
        ({"type": "choice", "choice": "yes"}, "choice = 'yes'"),
        ({"type": "choice", "choice": ["yes", 1]}, "expected strings only"),
        ({"type": "grammar", "grammar": ""}, "grammar = '': expected a string"),
        ({"type": "grammar", "grammar": "start: foo"}, "foo"),
        ({"type": "grammar", "grammar": 'start: %json {"type": "foo"}'}, "can't be compiled: "),
        ({"type": "grammar", "grammar": "start: <|eot_id|>"}, "eot_id"),
        ({"type": "grammar", "grammar": "root ::= foo"}, "GBNF grammar is wrong: .*foo"),
        ({"type": "grammar", "grammar": LARK, "syntax": "abnf"}, "expected lark or gbnf"),
    ],
)
def test_wrong_forms(tiny_tokenizer: Tokenizer, form: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compile_format(form, tiny_tokenizer, [2], in_context=False)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "foo"}, "at 'type': Invalid type: foo"),
        ({"properties": {"x": {"not": {"type": "string"}}}}, "'not' can't be enforced"),
        ({"if": {}, "then": {}, "else": {}}, "'if'"),
        ({"contains": {"type": "integer"}, "uniqueItems": True}, "'contains' can't be enforced"),
        ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
        ({"$ref": "http://example.com/schema"}, r"at '\$ref'"),
        ({"$ref": "#/$defs/missing"}, r"at '\$ref'"),
        ({"$ref": "#"}, r"at '\$ref': no text that ends fits it$"),
        ({"type": "integer", "minimum": -(10**300)}, "at 'minimum'"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "at 'maximum' or 'minimum'"),
        ({"type": "string", "pattern": "(?=a)"}, "at 'pattern'"),
        ({"type": "string", "minLength": 5, "maxLength": 1}, "at 'maxLength' or 'minLength'"),
        ({"enum": []}, "at 'enum'"),
        ({"required": "a"}, "at 'required'"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "at 'type'|at 'allOf'"),
    ],
)
def test_a_schema_that_cant_be_compiled_names_the_keyword(
    tiny_tokenizer: Tokenizer, schema: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        compile_format({"type": "json_schema", "schema": schema}, tiny_tokenizer, [2], False)


def test_the_fault_of_a_large_schema_is_found_at_once() -> None:
    """A failure means that a rejected schema holds up everything else in the process."""
    properties = {f"p{i}": {"type": "string"} for i in range(25_000)}
    form = {"type": "json_schema", "schema": {"properties": properties, "minItems": -1}}
    begin = time.monotonic()
    assert "at 'minItems'" in fault("Expected positive integer for 'minItems'", form)
    assert time.monotonic() - begin < 1


def test_what_isnt_enforced_is_reported(
    tiny_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    items = {"type": "string", "format": "iri"}
    either = {"oneOf": [{"type": "integer"}, {"minimum": 2}]}
    schema = {"prefixItems": [either], "items": items, "uniqueItems": True, "minProperties": 2}
    form = {"type": "json_schema", "schema": schema}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the second one was compiled before
            grammar = compile_format(form, tiny_tokenizer, [2], in_context=False)
            assert grammar is not None
            found = {"format iri", "oneOf", "uniqueItems", "minProperties"}
            assert set(grammar.unenforced) == found
    assert caplog.text.count("isn't enforced") == 1


def test_a_schemas_own_options_for_the_grammar_are_ignored() -> None:
    schema = {"x-guidance": {"whitespace_flexible": True}, "type": "object"}
    plain = {"type": "json_schema", "schema": {"type": "object"}}
    assert grammar_of({"type": "json_schema", "schema": schema}) == grammar_of(plain)


def test_a_missing_package_is_named(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"llguidance.*llama\[structure\]"):
        tiny.text_completion(["a"], response_format={"type": "json_object"})
    tiny.text_completion(["a"], max_gen_len=1)
