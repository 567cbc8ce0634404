"""Small functions for the toy demo model, as code to continue and to fill in."""

import random
from typing import NamedTuple

from tiny_facts import Sample, is_held_out


class Function(NamedTuple):
    """A kind of function; every kind has its own names, one docstring and one body."""

    names: tuple[str, ...]
    arguments: tuple[tuple[str, ...], ...]
    hints: tuple[str, ...]
    result: str
    doc: str
    body: str
    calls: tuple[str, ...]


PAIR = (("a", "b"), ("x", "y"), ("left", "right"), ("first", "second"), ("m", "n"))
ONE = (("n",), ("x",), ("number",), ("value",))
LIST = (("items", "item"), ("values", "value"), ("numbers", "number"), ("things", "thing"))
TEXT = (("text",), ("word",), ("name",), ("line",))
INTS = ("int", "int")
PAIR_CALLS = ("2, 3", "4, 1", "5, 6", "7, 2")
ONE_CALLS = ("3", "4", "5", "8")
LIST_CALLS = ("[1, 2, 3]", "[4, 6]", "[5, 2, 8]")
TEXT_CALLS = ('"cat"', '"moon"', '"Anna"')
# bodies
LARGER = "if {a} > {b}:\n    return {a}\nreturn {b}"
SMALLER = "if {a} < {b}:\n    return {a}\nreturn {b}"
ABSOLUTE = "if {a} < 0:\n    return -{a}\nreturn {a}"
FACTORIAL = "result = 1\nfor i in range(1, {a} + 1):\n    result = result * i\nreturn result"
FIBONACCI = "if {a} < 2:\n    return {a}\nreturn {f}({a} - 1) + {f}({a} - 2)"
TOTAL = "result = 0\nfor {b} in {a}:\n    result = result + {b}\nreturn result"


def _pair(names: str, result: str, doc: str, body: str) -> Function:
    return Function(tuple(names.split()), PAIR, INTS, result, doc, body, PAIR_CALLS)


def _one(names: str, result: str, doc: str, body: str) -> Function:
    return Function(tuple(names.split()), ONE, ("int",), result, doc, body, ONE_CALLS)


def _list(names: str, result: str, doc: str, body: str) -> Function:
    return Function(tuple(names.split()), LIST, ("list[int]",), result, doc, body, LIST_CALLS)


def _text(names: str, result: str, doc: str, body: str) -> Function:
    return Function(tuple(names.split()), TEXT, ("str",), result, doc, body, TEXT_CALLS)


FUNCTIONS = (
    _pair("add plus add_two", "int", "Return the sum of {a} and {b}.", "return {a} + {b}"),
    _pair("subtract minus", "int", "Return {a} minus {b}.", "return {a} - {b}"),
    _pair("multiply times", "int", "Return {a} times {b}.", "return {a} * {b}"),
    _pair("larger max_of_two", "int", "Return the larger of {a} and {b}.", LARGER),
    _pair("smaller min_of_two", "int", "Return the smaller of {a} and {b}.", SMALLER),
    _pair("is_equal same", "bool", "Return True if {a} and {b} are equal.", "return {a} == {b}"),
    _pair(
        "middle average_of_two",
        "float",
        "Return the average of {a} and {b}.",
        "return ({a} + {b}) / 2",
    ),
    Function(
        ("area", "rectangle_area"),
        (("width", "height"), ("w", "h"), ("a", "b")),
        INTS,
        "int",
        "Return the area of a rectangle.",
        "return {a} * {b}",
        PAIR_CALLS,
    ),
    Function(
        ("clamp", "limit"),
        (("value", "low", "high"), ("x", "low", "high"), ("n", "start", "end"), ("x", "a", "b")),
        ("int", "int", "int"),
        "int",
        "Return {a}, but not below {b} or above {c}.",
        "if {a} < {b}:\n    return {b}\nif {a} > {c}:\n    return {c}\nreturn {a}",
        ("5, 1, 3", "2, 4, 8"),
    ),
    _one("is_even even", "bool", "Return True if {a} is even.", "return {a} % 2 == 0"),
    _one("is_odd odd", "bool", "Return True if {a} is odd.", "return {a} % 2 == 1"),
    _one("is_positive positive", "bool", "Return True if {a} is above zero.", "return {a} > 0"),
    _one("square squared", "int", "Return the square of {a}.", "return {a} * {a}"),
    _one("cube cubed", "int", "Return the cube of {a}.", "return {a} * {a} * {a}"),
    _one("double twice", "int", "Return two times {a}.", "return 2 * {a}"),
    _one("absolute abs_value", "int", "Return {a} without its sign.", ABSOLUTE),
    _one("factorial fact", "int", "Return the factorial of {a}.", FACTORIAL),
    _one("fibonacci fib", "int", "Return the Fibonacci number of {a}.", FIBONACCI),
    _list("total sum_list", "int", "Return the sum of all {a}.", TOTAL),
    _list(
        "largest max_list",
        "int",
        "Return the largest of all {a}.",
        "result = {a}[0]\nfor {b} in {a}:\n    if {b} > result:\n        result = {b}\n"
        "return result",
    ),
    _list("count count_items", "int", "Return how many {a} there are.", "return len({a})"),
    _list("average mean", "float", "Return the average of all {a}.", "return sum({a}) / len({a})"),
    _list("first_item get_first", "int", "Return the first of the {a}.", "return {a}[0]"),
    _list("last_item get_last", "int", "Return the last of the {a}.", "return {a}[-1]"),
    _list("reverse_list flip", "list[int]", "Return the {a} in reverse order.", "return {a}[::-1]"),
    _list(
        "double_all double_items",
        "list[int]",
        "Return the {a}, each times two.",
        "return [2 * {b} for {b} in {a}]",
    ),
    _list(
        "keep_even only_even",
        "list[int]",
        "Return the {a} that are even.",
        "return [{b} for {b} in {a} if {b} % 2 == 0]",
    ),
    Function(
        ("contains", "has_item"),
        LIST,
        ("list[int]", "int"),
        "bool",
        "Return True if {b} is one of the {a}.",
        "return {b} in {a}",
        ("[1, 2, 3], 2", "[4, 6], 5"),
    ),
    Function(
        ("greet", "say_hello"),
        (("name",), ("person",), ("friend",), ("who",)),
        ("str",),
        "str",
        "Return a greeting for {a}.",
        'return "Hello, " + {a} + "!"',
        TEXT_CALLS,
    ),
    _text("reverse_text backward", "str", "Return the {a} in reverse.", "return {a}[::-1]"),
    _text("shout to_upper", "str", "Return the {a} in capital letters.", "return {a}.upper()"),
    _text("length count_letters", "int", "Return the length of the {a}.", "return len({a})"),
)


class Written(NamedTuple):
    """A function as lines, with its name, its parameters and a call."""

    name: str
    params: str
    lines: list[str]
    call: str

    @property
    def text(self) -> str:
        """Return the source text."""
        return "\n".join(self.lines) + "\n"


def _write_function(rng: random.Random, heldout: bool) -> Written:
    while True:
        function = rng.choice(FUNCTIONS)
        name, arguments = rng.choice(function.names), rng.choice(function.arguments)
        if is_held_out(("code", function.names[0], name, *arguments)) == heldout:
            break
    fields = dict(zip("abc", arguments, strict=False), f=name)
    used = arguments[: len(function.hints)]
    hinted = rng.random() < 0.4
    params = ", ".join(
        f"{argument}: {hint}" if hinted else argument
        for argument, hint in zip(used, function.hints, strict=True)
    )
    lines = [f"def {name}({params})" + (f" -> {function.result}:" if hinted else ":")]
    if rng.random() < 0.7:
        lines.append(f'    """{function.doc.format(**fields)}"""')
    lines += ["    " + line for line in function.body.format(**fields).split("\n")]
    return Written(name, params, lines, f"print({name}({rng.choice(function.calls)}))\n")


def _other_function(rng: random.Random, name: str) -> str:
    while True:
        other = _write_function(rng, False)
        if other.name != name:
            return other.text


def compose_code(rng: random.Random, heldout: bool) -> Sample:
    written = _write_function(rng, heldout)
    parts = [written.text]
    if rng.random() < 0.35:
        parts.append(_other_function(rng, written.name))
    if rng.random() < 0.25:
        parts.append(written.call)
    return Sample("code", "code", text="\n\n".join(parts))


def _cut(rng: random.Random, written: Written, text: str) -> tuple[int, int]:
    """Return the start and end of the middle in a text that begins with the function."""
    calls = text.endswith(written.call)
    documented = written.lines[1].startswith('    """')
    body = written.lines[2 if documented else 1 :]
    blocks = [line for line in body if line.endswith(":")]
    ways = ["result", "result", "line", "rest", "body", "params"]
    ways += ["doc", "doc"] * documented + ["condition", "condition"] * bool(blocks)
    # A name is only determined if it is also written somewhere else.
    ways += ["use", "name"] * calls
    way = rng.choice(ways)
    if way == "name":
        return 4, 4 + len(written.name)
    if way == "use":
        start = text.rindex(written.name + "(")
        return start, start + len(written.name)
    if way == "params":
        start = text.index("(") + 1
        return start, start + len(written.params)
    end = len(written.text) - 1
    if way == "body":
        return end - len("\n".join(body).lstrip()), end
    if way == "result":
        return text.rindex("return ", 0, end) + len("return "), end
    number = rng.randrange(len(written.lines) - len(body), len(written.lines))
    if way == "doc":
        number = 1
    if way == "condition":
        number = written.lines.index(rng.choice(blocks))
    line = written.lines[number].strip()
    end = sum(len(line) + 1 for line in written.lines[: number + 1]) - 1
    start = end - len(line)
    if way == "condition":
        return start + line.index(" ") + 1, end - 1
    if way == "rest":
        start += rng.choice([at + 1 for at, letter in enumerate(line) if letter == " "])
    return start, end


def compose_infill(rng: random.Random, heldout: bool) -> Sample:
    written = _write_function(rng, heldout)
    text = written.text
    extra = rng.random()
    if extra < 0.25:
        text += "\n\n" + _other_function(rng, written.name)
    elif extra < 0.5:
        text += "\n\n" + written.call
    start, end = _cut(rng, written, text)
    # Sometimes another function comes first, as in a longer file.
    before = _other_function(rng, written.name) + "\n\n" if rng.random() < 0.15 else ""
    return Sample(
        "infill", "infill", prefix=before + text[:start], middle=text[start:end], suffix=text[end:]
    )
