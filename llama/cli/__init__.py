"""Command lines: commands and flags, help, errors in one sentence, and progress."""

import ast
import difflib
import importlib
import inspect
import logging
import os
import re
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire import docstrings
from fire.parser import DefaultParseValue

from llama.cli.signatures import argument_descriptions, call, flat_signature
from llama.errors import need

if TYPE_CHECKING:
    import torch

# A function, or "module:function" for one that is imported when its command runs.
Command = Callable[..., object] | str

COMMANDS: dict[str, Command] = {
    "chat": "llama.commands.chat:main",
    "complete": "llama.commands.generate:complete",
    "infill": "llama.commands.generate:infill",
    "serve": "llama.server.serve:main",
    "evaluate": "llama.evaluate.command:main",
    "batch": "llama.batch.command:main",
    "inspect": "llama.checkpoint.inspection:inspect",
    "convert": "llama.convert:convert",
    "perplexity": "llama.perplexity:main",
    "plan": "llama.plan:main",
}
# Of the server's packages.
_PURPOSES = {"llama.server": "the server", "llama.batch": "a file of requests"}
DTYPES = ("float32", "bfloat16", "float16")
HELP = ("-h", "--help")
WIDTH = 96

_Empty = inspect.Parameter.empty
_EXPECTED = {bool: "True or False", int: "an integer", float: "a number", type(None): "None"}

logger = logging.getLogger(__name__)


class UsageError(Exception):
    """A command line has wrong arguments."""


def main(args: Sequence[str] | None = None) -> None:
    """Run ``python -m llama``, or the installed command ``llama``."""
    run_command(COMMANDS, "llama", args)


def run_command(
    commands: Mapping[str, Command], name: str = "", args: Sequence[str] | None = None
) -> None:
    """Run the command that the first argument names; without one, list all of them.

    Args:
        commands: functions by name.
        name: of the program, as in ``run``.
        args: as in ``run``.
    """
    name = name or Path(sys.argv[0]).name
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in HELP:
        width = max(map(len, commands)) + 2
        print(f"usage: {_program(name)} COMMAND ...\n")
        for command, function in commands.items():
            print(f"  {command:<{width}}{_summary(function)}")
        print(f"\n{_program(name)} COMMAND --help shows the flags of each.")
        return
    with _exit_on_error(name):
        if args[0] not in commands:
            hint = _nearest(args[0], commands) or f"there are {', '.join(commands)}"
            raise UsageError(f"there is no command {args[0]}: {hint}")
    run(commands[args[0]], f"{name} {args[0]}", args[1:])


def run(function: Command, name: str = "", args: Sequence[str] | None = None) -> None:
    """Call a function with a command line's arguments, or print its help.

    Parameters are given by position or as ``--name=value``, ``--name value`` and, for booleans,
    ``--name`` and ``--noname``; after ``--`` all are positional. What the function annotates as
    ``str`` stays text; other values must have their parameter's type. A parameter that takes a
    dataclass stands for that dataclass's fields.

    Exits with status 2 for arguments that the function doesn't take, before it is called, with 1
    for ``ImportError``, ``MemoryError``, ``OSError`` and ``ValueError``, whose message is printed
    without a traceback, and with 130 for Ctrl-C.

    Args:
        function: the function, or ``"module:function"``, which is imported first.
        name: of the command, for messages; the script's file name by default.
        args: the arguments; those of the process by default.
    """
    name = name or Path(sys.argv[0]).name
    args = sys.argv[1:] if args is None else args
    _log_progress()
    with _exit_on_error(name):
        if isinstance(function, str):
            function = _load(function)
        end = args.index("--") if "--" in args else len(args)
        if any(arg in HELP for arg in args[:end]):
            print(help_text(function, name))
            return
        call(function, parse(flat_signature(function), args).arguments)


def _load(command: str) -> Callable[..., object]:
    """Import the function of a command.

    Raises:
        ImportError: the server's packages aren't installed; says how to install them.
    """
    name, _, attribute = command.partition(":")
    purpose = _PURPOSES.get(".".join(name.split(".")[:2]))
    module = need(name, "server", purpose) if purpose else importlib.import_module(name)
    function = getattr(module, attribute)
    assert callable(function)
    return function


def _log_progress() -> None:
    """Print progress to the standard error, however a command sets up logging."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


@contextmanager
def _exit_on_error(name: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        print(f"{name}: {error}\n{_program(name)} --help shows all flags.", file=sys.stderr)
        sys.exit(2)
    except (ImportError, MemoryError, OSError, ValueError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _program(name: str) -> str:
    """Return the command line that runs the program or command ``name``."""
    return f"python -m {name}" if name.startswith("llama.") else name


def _nearest(word: str, names: Mapping[str, object], prefix: str = "") -> str:
    matches = difflib.get_close_matches(word, names, 1, cutoff=0.5)
    return f"did you mean {prefix}{matches[0]}?" if matches else ""


def parse(signature: inspect.Signature, args: Sequence[str]) -> inspect.BoundArguments:
    """Return a command line's arguments as those of a call.

    Raises:
        UsageError: an argument is unknown, missing, one too many or not of its parameter's type.
    """
    flags, texts = _split(signature.parameters, args)
    bound = signature.bind_partial()
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            bound.arguments[name] = tuple(_value(name, t, parameter.annotation) for t in texts)
            texts = []
            continue
        if name not in flags and texts and parameter.kind is not parameter.KEYWORD_ONLY:
            flags[name] = texts.pop(0)
        if name in flags:
            bound.arguments[name] = _value(name, flags[name], parameter.annotation)
        elif parameter.default is _Empty:
            raise UsageError(f"{name.upper()} is missing")
    if texts:
        raise UsageError(f"{texts[0]!r} is one argument too many")
    bound.apply_defaults()
    return bound


def _split(
    parameters: Mapping[str, inspect.Parameter], args: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Split a command line into flags, by their parameters' names, and positional arguments."""
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is not parameter.VAR_POSITIONAL
    }
    flags: dict[str, str] = {}
    texts: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            return flags, texts + rest
        if not _is_flag(arg):
            texts.append(arg)
            continue
        flag, equals, value = arg.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        negated = named.get(name.removeprefix("no").lstrip("_"))
        if name not in named and not equals and negated and negated.annotation is bool:
            name, equals, value = negated.name, "=", "False"
        if name not in named or not flag.startswith("--"):
            nearest = _nearest(name, named, "--")
            raise UsageError(f"there is no flag {flag}{': ' * bool(nearest)}{nearest}")
        if not equals:
            if rest and not _is_flag(rest[0]):
                value = rest.pop(0)
            elif named[name].annotation is bool:
                value = "True"
            else:
                raise UsageError(f"{flag} needs a value: {flag}=VALUE")
        flags[name] = value
    return flags, texts


def _is_flag(arg: str) -> bool:
    return re.match("--|-[A-Za-z]", arg) is not None  # a negative number isn't one


def _value(name: str, text: str, annotation: Any) -> Any:
    """Return a parameter's value, read from its text by the type that it is annotated with."""
    kinds = _kinds(annotation)
    if tuple in kinds and "," in text:
        return tuple(text.split(","))
    if str in kinds:
        return text
    if any((kind.__module__, kind.__name__) == ("torch", "dtype") for kind in kinds):
        return dtype_of(None if text == "None" else text)
    value = DefaultParseValue(text)
    if float in kinds and type(value) is int:
        return float(value)
    if not kinds or type(value) in kinds:
        return value
    if bool in kinds:
        raise UsageError(f"--{name} is {text!r}: give --{name}=True or --{name}=False")
    expected = " or ".join(_EXPECTED.get(kind, kind.__name__) for kind in kinds)
    raise UsageError(f"--{name} is {text!r}: expected {expected}")


def _kinds(annotation: Any) -> list[type]:
    """Return the types of an annotation's values; none for one that allows any value."""
    if annotation in (_Empty, Any, object):
        return []
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for member in typing.get_args(annotation) for kind in _kinds(member)]
    kind = type(None) if annotation is None else typing.get_origin(annotation) or annotation
    return [kind] if isinstance(kind, type) else []


def help_text(function: Callable[..., object], name: str) -> str:
    """Return the text of ``--help``: usage, docstring, and the arguments with their defaults."""
    doc = docstrings.parse(inspect.getdoc(function) or "")
    descriptions = argument_descriptions(function)
    usage, arguments, flags = f"usage: {_program(name)}", ["arguments:"], ["flags:"]
    for parameter in flat_signature(function).parameters.values():
        entry, section = parameter.name.upper(), arguments
        if parameter.kind is parameter.VAR_POSITIONAL:
            usage += f" [{entry} ...]"
        elif parameter.default is _Empty:
            usage += f" {entry}"
        else:
            entry, section = f"--{parameter.name}{_default(parameter)}", flags
        text = _wrapped(descriptions.get(parameter.name) or "", " " * 6)
        section.append(f"  {entry}" + f"\n{text}" * bool(text))
    usage += " [FLAGS]" * (len(flags) > 1)
    texts = [_wrapped(text) for text in (doc.summary, doc.description) if text]
    sections = ["\n".join(section) for section in (arguments, flags) if len(section) > 1]
    return "\n\n".join([usage, *texts, *sections])


def _default(parameter: inspect.Parameter) -> str:
    """Return the placeholder of a flag's value, and its default unless that is empty."""
    kinds = [kind for kind in _kinds(parameter.annotation) if kind not in (type(None), tuple)]
    is_switch = parameter.default is False  # which needs no value
    kind = f"={kinds[0].__name__.upper()}" if kinds and not is_switch else ""
    return kind + ("" if parameter.default in (None, "", ()) else f" (default {parameter.default})")


def _wrapped(text: str, indent: str = "") -> str:
    """Return a text's paragraphs in lines of at most ``WIDTH`` characters."""
    return "\n\n".join(
        textwrap.fill(
            " ".join(paragraph.split()), WIDTH, initial_indent=indent, subsequent_indent=indent
        )
        for paragraph in text.replace("``", "").split("\n\n")
    )


def _summary(function: Command) -> str:
    """Return the first paragraph of a function's docstring, without importing its module."""
    if not isinstance(function, str):
        text = inspect.getdoc(function) or ""
    else:
        module, _, attribute = function.partition(":")
        path = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == attribute:
                text = ast.get_docstring(node) or ""
                break
        else:
            raise AttributeError(f"{path} doesn't define {attribute}")
    return " ".join(text.partition("\n\n")[0].replace("``", "").split())


def dtype_of(name: str | None) -> "torch.dtype | None":
    """Return the dtype that a flag names, None for None.

    Raises:
        ValueError: the name isn't one of ``DTYPES``.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}: expected {', '.join(DTYPES)}")
    import torch  # takes a second, which help doesn't need

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


DELAY = 0.5  # seconds before a bar is drawn: shorter tasks need none


class progress:
    """Shows how much of a total is done: as a tqdm bar in a terminal, otherwise in the log.

    Used as ``with progress(n_bytes, "writing") as show: ... show(n_written)``. The bar is closed at
    the end of the block or when all is done, so that the object can be passed on without a block.
    The log gets a line every five seconds. Of several processes only the first one shows anything.

    Args:
        total: the amount that is done at the end, in ``unit``.
        description: the activity, such as "writing".
        unit: "B" for bytes, else a word.
    """

    def __init__(self, total: int, description: str, unit: str = "B"):
        self.total, self._description = max(1, total), description
        self._logged = time.monotonic()
        self._shown = os.environ.get("RANK", "0") == "0"
        self._bar: Any = None
        if self._shown and sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                unit = unit if unit == "B" else f" {unit}"
                self._bar = tqdm(
                    total=total, desc=description, unit=unit, unit_scale=True, delay=DELAY
                )

    def __call__(self, done: int, detail: str = "") -> None:
        """Show that ``done`` units of the total are done, and a detail such as the speed."""
        done = min(done, self.total)  # a file is a little larger than its weights
        if self._bar is not None:
            if detail:
                self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(done - self._bar.n)
            if done == self.total:
                self._bar.close()
        elif self._shown and time.monotonic() > self._logged + 5:
            self._logged = time.monotonic()
            detail = f" ({detail})" if detail else ""
            logger.info("%s: %d %%%s", self._description, 100 * done // self.total, detail)

    def __enter__(self) -> "progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
