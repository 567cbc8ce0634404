"""Inference for the Llama family in plain PyTorch: ``Llama.build`` is the way in."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.args import ModelArgs
    from llama.chat.prompts import Dialog, Message
    from llama.generation import Llama
    from llama.model import Transformer
    from llama.tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "Message", "ModelArgs", "Tokenizer", "Transformer"]

_HOMES = {
    "Dialog": "chat.prompts",
    "Llama": "generation",
    "Message": "chat.prompts",
    "ModelArgs": "args",
    "Tokenizer": "tokenizer",
    "Transformer": "model",
}


def __getattr__(name: str) -> object:
    # Imported when asked for, so that ``python -m llama.checkpoint`` runs the module just once.
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    return getattr(import_module(f"llama.{_HOMES[name]}"), name)
