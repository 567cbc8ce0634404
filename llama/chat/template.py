"""Chat templates in Jinja's language, rendered in a sandbox."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from llama.chat.marks import Marks
from llama.chat.template_tree import (
    STEP,
    count_work,
    joins_arguments,
    mark_structure,
    reads_parts,
)
from llama.errors import need, printable

# Names that no template needs, and those that make text of any size from a number.
_UNNEEDED_FILTERS = "batch center format indent pprint random round slice urlize wordwrap xmlattr"
_UNNEEDED_GLOBALS = "cycler joiner lipsum"
_UNNEEDED_METHODS = "center expandtabs format format_map ljust rjust to_bytes translate zfill"

# Methods that take characters, not a text to search for.
_STRIPPING = ("strip", "lstrip", "rstrip")

# The roles that may be part of a control piece's spelling, as in <|user|>.
_ROLES = ("system", "user", "assistant", "tool", "ipython")

# The work that a rendering may do: characters that it joins, and steps of this many each.
_MAX_WORK = 100_000_000
# The variable that counts a rendering's work: a name that no template can write.
_WORK = "work done"


class ChatTemplate:
    """A template in Jinja's language, as Hugging Face's checkpoints have it.

    Attributes:
        reads_parts: whether it goes through the parts of a message's content.
        joins_arguments: whether it takes a tool call's arguments for a text.
    """

    def __init__(self, source: str, marks: Marks | None = None):
        """Parse a template.

        Args:
            source: the template.
            marks: of the control pieces that the template spells; None marks nothing.

        Raises:
            ImportError: the package ``jinja2`` is missing.
            ValueError: it isn't written in Jinja's language.
        """
        environment = _environment(marks)
        try:
            tree = environment.parse(source)
            self.reads_parts, self.joins_arguments = reads_parts(tree), joins_arguments(tree)
            if marks is not None:
                mark_structure(tree, marks.mark)
            count_work(tree)
            self._template = environment.from_string(tree)
        # Jinja's errors, and Python's about the code that Jinja generates from a strange template.
        except Exception as error:
            raise ValueError(
                f"the checkpoint's chat template can't be read: {_reason(error)}"
            ) from error

    def render(self, messages: Iterable[Mapping[str, Any]], **names: Any) -> str:
        """Return the prompt for the next answer, with the structure's control pieces marked.

        Args:
            messages: the dialog, without the characters of marks.
            names: other variables of the template, such as ``bos_token``.

        Raises:
            ValueError: the template refuses the dialog, or does something that no template needs.
        """
        work = _Work()

        def limited_range(*bounds: int) -> Sequence[int]:
            numbers = range(*bounds)
            work.spend(STEP * len(numbers))
            return numbers

        variables: dict[str, Any] = {
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **names,
            "messages": [dict(message) for message in messages],
            "range": limited_range,
            _WORK: work,
        }
        try:
            text = self._template.render(variables)
        except Exception as error:  # a template can raise any error
            raise ValueError(f"the checkpoint's chat template failed: {_reason(error)}") from error
        return str(text)


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__, 200)


class _Work:
    """The work of a rendering, limited so that it ends and doesn't fill the memory."""

    def __init__(self) -> None:
        self._left = _MAX_WORK

    def spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise ValueError("it does far more than a template needs to")

    def weigh(self, value: object) -> None:
        """Count a value that is about to be copied or written out, with all its items."""
        self.spend(len(value) if isinstance(value, str) else STEP)
        if isinstance(value, Mapping):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple):
            for item in value:
                self.weigh(item)


def _environment(marks: Marks | None) -> Any:
    """Return Jinja's sandbox, which hides Python's internals, with limits to a rendering's work."""
    unmarked = _unmarked_by(marks)
    jinja2: Any = need("jinja2")
    sandbox: Any = need("jinja2.sandbox")
    ext: Any = need("jinja2.ext")

    class Generation(ext.Extension):
        """The block around a model's own text, which has a meaning in training only."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                context[_WORK].weigh((left, right))
                return super().call_binop(context, operator, left, right)
            numbers = isinstance(left, int) and isinstance(right, int)
            largest = (1000, 100) if operator == "**" else (2**63, 2**63)
            if not numbers or abs(left) > largest[0] or abs(right) > largest[1]:
                raise sandbox.SecurityError(f"{operator} is for small numbers here")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            context[_WORK].spend(STEP)
            name, text = (getattr(function, key, None) for key in ("__name__", "__self__"))
            if isinstance(text, str) and name != "join":  # methods that search in a text
                args = tuple(unmarked(arg, "" if name in _STRIPPING else text) for arg in args)
            if isinstance(text, str) and name == "join":
                return _join(context, args[0] if args else "", text)
            if isinstance(text, str) and name == "replace":
                return _replace(context, text, *args)
            result = super().call(context, function, *args, **kwargs)
            context[_WORK].spend(len(result) if isinstance(result, str | list) else 1)
            return result

        def wrap_str_format(self, value: Any) -> None:
            """Return None: ``is_safe_attribute`` refuses the methods that Jinja would replace."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            safe: bool = super().is_safe_attribute(obj, attr, value)
            return safe and not (isinstance(obj, str | int) and attr in _UNNEEDED_METHODS.split())

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=jinja2.pass_context(_output),
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    for name in _UNNEEDED_FILTERS.split():
        environment.filters.pop(name, None)
    for name in _UNNEEDED_GLOBALS.split():
        environment.globals.pop(name, None)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_role(role: object, before: str, after: str) -> str:
        text = f"{before}{role}{after}"
        return text if marks is None or role not in _ROLES else marks.mark(text)

    environment.filters |= {"unmarked": unmarked, "as_role": as_role}
    for function in (_counted, _join, _replace, _tojson):
        environment.filters[function.__name__[1:]] = jinja2.pass_context(function)
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
    )
    return environment


def _unmarked_by(marks: Marks | None) -> Callable[..., Any]:
    def unmarked(value: Any, searched: str = "") -> Any:
        """Return a value that something is compared with, or that is searched for in a text."""
        if isinstance(value, str):
            return value if marks is None or (value and value in searched) else marks.unmark(value)
        if isinstance(value, list | tuple):
            return type(value)(unmarked(item, searched) for item in value)
        return value

    return unmarked


def _counted(context: Any, items: Iterable[Any], weight: int) -> list[Any]:
    counted = list(items)
    context[_WORK].spend(weight * len(counted))
    return counted


def _output(context: Any, value: object) -> str:
    context[_WORK].weigh(value)
    return str(value)


def _join(context: Any, items: Iterable[Any], between: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        items = [context.environment.getitem(item, attribute) for item in items]
    parts = list(items)
    context[_WORK].weigh(parts)
    context[_WORK].spend(len(parts) * len(between))
    return str(between).join(map(str, parts))


def _replace(context: Any, text: object, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    context[_WORK].spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _tojson(
    context: Any,
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes some characters for HTML.
    context[_WORK].weigh(value)
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise ValueError("tojson indents by 0 to 16 spaces here")
    if separators is not None and sum(map(len, separators)) > 16:
        raise ValueError("tojson has short separators here")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
