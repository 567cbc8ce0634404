"""Follow instructions with a model tuned for them.

python examples/example_instructions.py
torchrun --nproc_per_node 1 examples/example_instructions.py --ckpt_dir CodeLlama-7b-Instruct/
"""

from example_chat_completion import answer

from llama import Dialog, Llama, cli
from llama.generation import TINY

INSTRUCTIONS: list[Dialog] = [
    [{"role": "user", "content": "Count from 3 to 9."}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Which animal says quack?"},
    ],
    [{"role": "user", "content": "Tell me a story about a cat."}],
]


def main(
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    max_gen_len: int | None = None,
    stream: bool = False,
) -> None:
    """Print a few instructions and the model's answers; ``stream`` shows them as they come."""
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    answer(llama, INSTRUCTIONS, temperature, top_p, max_gen_len, stream)


if __name__ == "__main__":
    cli.run(main)
