"""Signatures of commands: a parameter that takes a dataclass stands for the dataclass's fields."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fire import docstrings


def flat_signature(function: Callable[..., object]) -> inspect.Signature:
    """Return a function's signature, with each dataclass's fields as parameters of their own."""
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        parameters += _fields(parameter) or [parameter]
    return inspect.Signature(parameters)


def _fields(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Return the fields of the dataclass that a parameter takes; none for other parameters."""
    kind = parameter.annotation
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return []
    fields = inspect.signature(kind, eval_str=True).parameters.values()
    return [
        field.replace(
            kind=parameter.kind, default=getattr(parameter.default, field.name, field.default)
        )
        for field in fields
    ]


def call(function: Callable[..., object], values: Mapping[str, Any]) -> Any:
    """Return what a function returns for the values of its flat signature's parameters."""
    signature = inspect.signature(function, eval_str=True)
    bound = signature.bind_partial()
    for name, parameter in signature.parameters.items():
        fields = {field.name: values[field.name] for field in _fields(parameter)}
        bound.arguments[name] = parameter.annotation(**fields) if fields else values[name]
    return function(*bound.args, **bound.kwargs)


def argument_descriptions(function: Callable[..., object]) -> dict[str, str | None]:
    """Return the descriptions of a function's arguments and of its dataclasses' fields."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    bases = [base for p in parameters if _fields(p) for base in inspect.getmro(p.annotation)[::-1]]
    docs = [docstrings.parse(inspect.getdoc(each) or "") for each in (*bases, function)]
    return {arg.name: arg.description for doc in docs for arg in doc.args or ()}
