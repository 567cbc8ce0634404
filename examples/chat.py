"""Talk with a model in the terminal.

pip install -e '.[chat]' && python examples/chat.py
torchrun --nproc_per_node 1 examples/chat.py --ckpt_dir llama-2-7b-chat/
"""

from llama import cli
from llama.commands.chat import main

if __name__ == "__main__":
    cli.run(main)
