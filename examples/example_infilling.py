"""Fill in what is missing in the middle of code, with a model trained for it.

python examples/example_infilling.py
torchrun --nproc_per_node 1 examples/example_infilling.py --ckpt_dir CodeLlama-7b/
"""

from llama import Llama, cli
from llama.generation import TINY
from llama.parallel import print_once

PROMPTS = [
    "def add(left, right):\n    <FILL>\n    return left + right\n",
    "def max_list(numbers):\n"
    '    """Return the largest of all numbers."""\n'
    "    result = numbers[0]\n"
    "    for number in numbers:\n"
    "        if <FILL>:\n"
    "            result = number\n"
    "    return result\n",
]


def main(
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_gen_len: int = 128,
    max_batch_size: int = 4,
    stream: bool = False,
) -> None:
    """Print a few functions whose ``<FILL>`` the model filled; ``stream`` as it comes."""
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    parts = [prompt.split("<FILL>") for prompt in PROMPTS]
    prefixes, suffixes = [p for p, _ in parts], [s for _, s in parts]
    if stream:
        for prefix, suffix in zip(prefixes, suffixes, strict=True):
            print_once(prefix, end="")
            pieces = llama.text_infilling_stream(prefix, suffix, temperature, top_p, max_gen_len)
            for piece in pieces:
                print_once(piece, end="")
            print_once(suffix)
        return
    results = llama.text_infilling(prefixes, suffixes, temperature, top_p, max_gen_len)
    for prompt, result in zip(PROMPTS, results, strict=True):
        print_once(f"{prompt}\n> {result['generation']}\n")
        print_once(result["full_text"])


if __name__ == "__main__":
    cli.run(main)
