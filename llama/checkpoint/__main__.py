"""``python -m llama.checkpoint``: inspect a checkpoint, or ``reshard`` one of Meta's layout."""

import sys

import fire

from llama.checkpoint.inspection import inspect
from llama.checkpoint.save import reshard

if __name__ == "__main__":
    try:
        fire.Fire({"reshard": reshard} if sys.argv[1:2] == ["reshard"] else inspect)
    except (MemoryError, OSError, ValueError) as error:
        sys.exit(f"llama.checkpoint: {error}")
