"""Inference for the Llama family in plain PyTorch; start with ``Llama.build``."""

from llama import huge_pages as huge_pages  # before PyTorch allocates memory
from llama.args import ModelArgs
from llama.chat.prompts import Dialog, Message
from llama.generation import Llama
from llama.model import Transformer
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

__all__ = [
    "Dialog",
    "Llama",
    "Message",
    "ModelArgs",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
]
