"""Continue texts with a pretrained model.

python examples/example_text_completion.py
torchrun --nproc_per_node 1 examples/example_text_completion.py --ckpt_dir llama-2-7b/
"""

from llama import Llama, cli
from llama.commands.flags import BatchFlags, SamplingFlags
from llama.parallel import print_once

PROMPTS = [
    "Once upon a time, there was a little girl named Mia.",
    "One sunny morning, Tom went to the park.",
    "Sam had a red kite. One day,",
    "Early in the morning, Lily walked to the lake.",
]
BUILD = BatchFlags(max_seq_len=256, max_batch_size=4)
SAMPLING = SamplingFlags(temperature=0.6, top_p=0.9, max_gen_len=128)


def complete(llama: Llama, prompts: list[str], sampling: SamplingFlags, stream: bool) -> None:
    """Print prompts and their continuations; with ``stream`` as they are generated."""
    if stream:
        for prompt in prompts:
            print_once(f"{prompt}\n> ", end="")
            for piece in llama.text_completion_stream(prompt, **vars(sampling)):
                print_once(piece, end="")
            print_once("\n")
        return
    results = llama.text_completion(prompts, **vars(sampling))
    for prompt, result in zip(prompts, results, strict=True):
        print_once(f"{prompt}\n> {result['generation']}\n")


def main(
    build: BatchFlags = BUILD, sampling: SamplingFlags = SAMPLING, stream: bool = False
) -> None:
    """Print a few texts and the model's continuations; ``stream`` as they are generated."""
    llama = Llama.build(**vars(build))
    complete(llama, PROMPTS, sampling, stream)


if __name__ == "__main__":
    cli.run(main)
