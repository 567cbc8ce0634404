"""Packages that only some formats need."""

import importlib
from types import ModuleType

# The packages on the index whose modules have another name.
_PACKAGES = {"google.protobuf": "protobuf", "sentencepiece.sentencepiece_model_pb2": "protobuf"}


def need(module: str) -> ModuleType:
    """Import a module of the extra ``formats``.

    Raises:
        ImportError: its package isn't installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module, module.split(".")[0])
        raise ImportError(
            f"this checkpoint's format needs the package {package}: "
            "pip install 'llama[formats]' brings it"
        ) from error
