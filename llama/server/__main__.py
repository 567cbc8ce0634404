"""The command ``python -m llama.server``."""

from llama.cli import run

if __name__ == "__main__":
    run("llama.server.serve:main", "llama.server")
