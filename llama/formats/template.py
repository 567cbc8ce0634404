"""Chat templates: a dialog written out by the checkpoint's own rule, in a sandbox."""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from llama.formats.extras import need

# What a template has no use for, and what makes text of any size from a number.
_UNNEEDED = ("center", "format", "indent", "pprint", "random", "urlize", "wordwrap", "xmlattr")


class ChatTemplate:
    """A template in Jinja's language, as Hugging Face's checkpoints bring it."""

    def __init__(self, source: str):
        """Parse a template.

        Raises:
            ImportError: the package ``jinja2`` is missing.
            ValueError: it isn't written in Jinja's language.
        """
        try:
            self._template = _environment().from_string(source)
        except need("jinja2").TemplateError as error:
            raise ValueError(f"the checkpoint's chat template can't be read: {error}") from error

    def render(self, messages: Iterable[Mapping[str, Any]], **names: str) -> str:
        """The prompt for the next answer, with the control pieces written out.

        Args:
            messages: the dialog.
            names: what else the template may use, such as ``bos_token``.

        Raises:
            ValueError: the template refuses the dialog, or does what no template needs.
        """
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                range=_limited_range(),
                **names,
            )
        # Whatever goes wrong in there is the template's doing.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"the checkpoint's chat template failed: {reason}") from error
        return str(text)


def _environment() -> Any:
    """Jinja's sandbox, which keeps a template from Python's insides, with limits to its work."""
    jinja2: Any = need("jinja2")
    sandbox: Any = need("jinja2.sandbox")
    ext: Any = need("jinja2.ext")

    class Generation(ext.Extension):
        """Marks what a model wrote; of meaning in training only."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int) and isinstance(right, int)
            if not numbers or (operator == "**" and (abs(left) > 1000 or right > 100)):
                raise sandbox.SecurityError(f"{operator} is for small numbers here")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    for name in _UNNEEDED:
        environment.filters.pop(name, None)
    environment.filters["tojson"] = _tojson

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
    )
    return environment


def _limited_range() -> Any:
    """``range`` that gives so many numbers in all, lest loops in loops never end."""
    left = iter(range(1_000_000))

    def limited(*bounds: int) -> Iterable[int]:
        for number in range(*bounds):
            if next(left, None) is None:
                raise ValueError("the template counts too far")
            yield number

    return limited


def _tojson(value: object, indent: int | None = None) -> str:
    # Jinja's own filter writes some characters as HTML would need them.
    return json.dumps(value, ensure_ascii=False, indent=indent)
