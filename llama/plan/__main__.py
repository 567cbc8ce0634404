"""The command ``python -m llama.plan``."""

from llama.cli import run

if __name__ == "__main__":
    run("llama.plan:main", "llama.plan")
