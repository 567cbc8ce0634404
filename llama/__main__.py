"""All commands: ``python -m llama``."""

from llama.cli import main

if __name__ == "__main__":
    main()
