"""Inference for the Llama family in plain PyTorch: ``Llama.build`` is the way in."""

from llama.generation import Llama
from llama.model import ModelArgs, Transformer
from llama.prompts import Dialog, Message
from llama.tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "Message", "ModelArgs", "Tokenizer", "Transformer"]
