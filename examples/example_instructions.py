"""Follow instructions with a model tuned for them.

python examples/example_instructions.py
torchrun --nproc_per_node 1 examples/example_instructions.py --ckpt_dir CodeLlama-7b-Instruct/
"""

from example_chat_completion import answer

from llama import Dialog, Llama, cli
from llama.commands.flags import BatchFlags, SamplingFlags

SAMPLING = SamplingFlags(temperature=0.2, top_p=0.95)
INSTRUCTIONS: list[Dialog] = [
    [{"role": "user", "content": "Count from 3 to 9."}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Which animal says quack?"},
    ],
    [{"role": "user", "content": "Tell me a story about a cat."}],
]


def main(build: BatchFlags, sampling: SamplingFlags = SAMPLING, stream: bool = False) -> None:
    """Print a few instructions and the model's answers; ``stream`` as they are generated."""
    llama = Llama.build(**vars(build))
    answer(llama, INSTRUCTIONS, sampling, stream)


if __name__ == "__main__":
    cli.run(main)
