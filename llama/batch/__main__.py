"""Answer a file of requests: ``python -m llama.batch IN.jsonl OUT.jsonl``."""

from llama.cli import run

if __name__ == "__main__":
    run("llama.batch.command:main", "llama.batch")
