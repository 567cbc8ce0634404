"""Answer dialogs with a model tuned for chat.

python examples/example_chat_completion.py
torchrun --nproc_per_node 1 examples/example_chat_completion.py --ckpt_dir llama-2-7b-chat/
"""

from llama import Dialog, Llama, cli
from llama.commands.flags import BatchFlags, SamplingFlags
from llama.parallel import print_once

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "What does the cow say?"}],
    [
        {"role": "user", "content": "What does a duck eat?"},
        {"role": "assistant", "content": "The duck eats bread."},
        {"role": "user", "content": "And what color is it?"},
    ],
    [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Where does the bee live?"},
    ],
    [{"role": "user", "content": "Anna has a blue kite. What color is the kite?"}],
]


def answer(llama: Llama, dialogs: list[Dialog], sampling: SamplingFlags, stream: bool) -> None:
    """Print dialogs and their answers; with ``stream`` as they are generated."""
    if stream:
        answers = [llama.chat_completion_stream(dialog, **vars(sampling)) for dialog in dialogs]
    else:
        results = llama.chat_completion(dialogs, **vars(sampling))
        answers = [iter([result["generation"]["content"]]) for result in results]
    for dialog, pieces in zip(dialogs, answers, strict=True):
        for message in dialog:
            print_once(f"{message['role'].capitalize()}: {message['content']}\n")
        print_once("> Assistant: ", end="")
        for piece in pieces:
            print_once(piece, end="")
        print_once("\n\n==================================\n")


def main(
    build: BatchFlags, sampling: SamplingFlags, stream: bool = False, chat_format: str | None = None
) -> None:
    """Print a few dialogs and the model's answers; ``stream`` as they are generated."""
    llama = Llama.build(**vars(build), chat_format=chat_format)
    answer(llama, DIALOGS, sampling, stream)


if __name__ == "__main__":
    cli.run(main)
