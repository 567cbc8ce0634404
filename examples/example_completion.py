"""Continue code with a pretrained model.

python examples/example_completion.py
torchrun --nproc_per_node 1 examples/example_completion.py --ckpt_dir CodeLlama-7b/
"""

from example_text_completion import complete

from llama import Llama, cli
from llama.generation import TINY

PROMPTS = [
    'def area(width, height):\n    """Return',
    "def is_even(number: int) -> bool:",
]


def main(
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
    stream: bool = False,
) -> None:
    """Print what the model makes of a few beginnings; ``stream`` shows it as it comes."""
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    complete(llama, PROMPTS, temperature, top_p, max_gen_len, stream)


if __name__ == "__main__":
    cli.run(main)
