"""Continue texts with a pretrained model.

python examples/example_text_completion.py
torchrun --nproc_per_node 1 examples/example_text_completion.py --ckpt_dir llama-2-7b/
"""

from llama import Llama, cli
from llama.generation import TINY
from llama.parallel import print_once

PROMPTS = [
    "Once upon a time, there was a little girl named Mia.",
    "One sunny morning, Tom went to the park.",
    "Sam had a red kite. One day,",
    "Early in the morning, Lily walked to the lake.",
]


def complete(
    llama: Llama,
    prompts: list[str],
    temperature: float,
    top_p: float,
    max_gen_len: int | None,
    stream: bool,
) -> None:
    """Print prompts and their continuations, which ``stream`` shows as they come."""
    if stream:
        for prompt in prompts:
            print_once(f"{prompt}\n> ", end="")
            for piece in llama.text_completion_stream(prompt, temperature, top_p, max_gen_len):
                print_once(piece, end="")
            print_once("\n")
        return
    results = llama.text_completion(prompts, temperature, top_p, max_gen_len)
    for prompt, result in zip(prompts, results, strict=True):
        print_once(f"{prompt}\n> {result['generation']}\n")


def main(
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_gen_len: int = 128,
    max_batch_size: int = 4,
    stream: bool = False,
) -> None:
    """Print what the model makes of a few beginnings; ``stream`` shows it as it comes."""
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    complete(llama, PROMPTS, temperature, top_p, max_gen_len, stream)


if __name__ == "__main__":
    cli.run(main)
