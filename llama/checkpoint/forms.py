"""The forms of quantised weights as ``params.json`` describes them, under ``quantization``.

``{"format": "int8"}`` and ``{"format": "int4", "group_size": 64}`` are the schemes of
``quantize=``. Otherwise there is a list of forms, each with its modules::

    {"format": "mixed", "forms": [{"format": "grouped", "codes": "int4", "group_size": 32, ...,
                                   "modules": ["layers.0.attention.wq", ...]}]}
"""

from collections.abc import Iterable
from typing import Any

import torch

from llama.checkpoint.rounding import GROUP_SIZES, Scheme, is_made_here, make_scheme
from llama.checkpoint.sharding import Forms
from llama.errors import short
from llama.layers.quantization import Form, Grouped

_SCALES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_EXAMPLES = '{"format": "int8"}, {"format": "int4", "group_size": 64} and {"format": "mixed", ...}'


def forms_params(forms: Forms, modules: Iterable[str]) -> dict[str, Any]:
    """Return the description of forms of a network that has these modules."""
    different: dict[Form, list[str]] = {}
    for module, form in forms.items():
        different.setdefault(form, []).append(module)
    if len(different) == 1:
        [form] = different
        if is_made_here(form):
            applies = Scheme(form).applies_to
            if forms.keys() == {module for module in modules if applies(module)}:
                return form.params()
    described = [form.params() | {"modules": names} for form, names in different.items()]
    return {"format": "mixed", "forms": described}


def read_forms(found: object, tensors: Iterable[str], source: str) -> dict[str, Form]:
    """Return the forms of a file's weights by module.

    Args:
        found: the description; None if the weights are plain.
        tensors: the names of the file's tensors.
        source: the file that describes them, for errors.

    Raises:
        ValueError: a form is unknown.
    """
    if found is None:
        return {}
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    if isinstance(found, dict):
        try:
            if found.get("format") != "mixed":
                scheme = _scheme(found)
                return {module: scheme.form for module in modules if scheme.applies_to(module)}
            if set(found) == {"format", "forms"}:
                return _mixed(found["forms"], modules)
        except (KeyError, TypeError, ValueError):
            pass
    raise ValueError(
        f"quantization is {short(found)} in {source}: this version reads {_EXAMPLES}; convert the "
        "weights again"
    )


def _scheme(found: dict[str, Any]) -> Scheme:
    if not set(found) <= {"format", "group_size"} or not isinstance(found.get("format"), str):
        raise ValueError
    return make_scheme(found["format"], found.get("group_size"))


def _mixed(described: list[dict[str, Any]], modules: list[str]) -> dict[str, Form]:
    forms: dict[str, Form] = {}
    for entry in described:
        names = entry["modules"]
        form = _form({key: value for key, value in entry.items() if key != "modules"})
        if not isinstance(names, list) or not forms.keys().isdisjoint(names):
            raise ValueError
        if not set(names) <= set(modules):
            raise ValueError
        forms |= dict.fromkeys(names, form)
    return forms


def _form(entry: dict[str, Any]) -> Form:
    """Return the form that ``Form.params`` describes."""
    if entry.get("format") != "grouped":
        return _scheme(entry).form
    size = entry["group_size"]
    if entry["codes"] not in ("int4", "int8", "float8") or size not in (0, 16, *GROUP_SIZES):
        raise ValueError
    if type(size) is not int or not all(type(entry[key]) is bool for key in ("zeros", "order")):
        raise ValueError
    form = Grouped(entry["codes"], size, entry["zeros"], _SCALES[entry["scales"]], entry["order"])
    if form.params() != entry:
        raise ValueError
    return form
