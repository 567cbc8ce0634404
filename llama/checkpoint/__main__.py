"""``python -m llama.checkpoint``: inspect a checkpoint, or ``reshard`` one of Meta's layout."""

import sys

from llama.checkpoint.inspection import inspect
from llama.checkpoint.save import reshard
from llama.cli import run

if __name__ == "__main__":
    if sys.argv[1:2] == ["reshard"]:
        run(reshard, "llama.checkpoint reshard", sys.argv[2:])
    else:
        run(inspect, "llama.checkpoint")
