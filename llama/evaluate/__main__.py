"""Evaluate a model: ``python -m llama.evaluate CKPT --tasks …``."""

from llama.cli import run
from llama.evaluate.command import main

if __name__ == "__main__":
    run(main, "llama.evaluate")
