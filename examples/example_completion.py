"""Continue code with a pretrained model.

python examples/example_completion.py
torchrun --nproc_per_node 1 examples/example_completion.py --ckpt_dir CodeLlama-7b/
"""

from example_text_completion import complete

from llama import Llama, cli
from llama.commands.flags import BatchFlags, SamplingFlags

BUILD = BatchFlags(max_seq_len=256, max_batch_size=4)
SAMPLING = SamplingFlags(temperature=0.2, top_p=0.9)
PROMPTS = [
    'def area(width, height):\n    """Return',
    "def is_even(number: int) -> bool:",
]


def main(
    build: BatchFlags = BUILD, sampling: SamplingFlags = SAMPLING, stream: bool = False
) -> None:
    """Print the model's continuations of code; ``stream`` as they are generated."""
    complete(Llama.build(**vars(build)), PROMPTS, sampling, stream)


if __name__ == "__main__":
    cli.run(main)
