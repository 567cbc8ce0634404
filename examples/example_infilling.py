"""Fill in the middle of code with a model trained for infilling.

python examples/example_infilling.py
torchrun --nproc_per_node 1 examples/example_infilling.py --ckpt_dir CodeLlama-7b/
"""

from llama import Llama, cli
from llama.commands.flags import BatchFlags, SamplingFlags
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
BUILD = BatchFlags(max_seq_len=256, max_batch_size=4)
SAMPLING = SamplingFlags(temperature=0.0, max_gen_len=128)


def main(
    build: BatchFlags = BUILD, sampling: SamplingFlags = SAMPLING, stream: bool = False
) -> None:
    """Print a few functions whose ``<FILL>`` the model fills in; ``stream`` as it is generated."""
    llama = Llama.build(**vars(build))
    prefixes, suffixes = zip(*(prompt.split("<FILL>") for prompt in PROMPTS), strict=True)
    if stream:
        for prefix, suffix in zip(prefixes, suffixes, strict=True):
            print_once(prefix, end="")
            for piece in llama.text_infilling_stream(prefix, suffix, **vars(sampling)):
                print_once(piece, end="")
            print_once(suffix)
        return
    results = llama.text_infilling(prefixes, suffixes, **vars(sampling))
    for prompt, result in zip(PROMPTS, results, strict=True):
        print_once(f"{prompt}\n> {result['generation']}\n")
        print_once(result["full_text"])


if __name__ == "__main__":
    cli.run(main)
