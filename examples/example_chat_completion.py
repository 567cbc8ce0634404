"""Answer dialogs with a model tuned for chat.

python examples/example_chat_completion.py
torchrun --nproc_per_node 1 examples/example_chat_completion.py --ckpt_dir llama-2-7b-chat/
"""

from llama import Dialog, Llama, cli
from llama.generation import TINY
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


def answer(
    llama: Llama,
    dialogs: list[Dialog],
    temperature: float,
    top_p: float,
    max_gen_len: int | None,
    stream: bool,
) -> None:
    """Print dialogs and their answers, which ``stream`` shows as they come."""
    if stream:
        answers = [
            llama.chat_completion_stream(dialog, temperature, top_p, max_gen_len)
            for dialog in dialogs
        ]
    else:
        results = llama.chat_completion(dialogs, temperature, top_p, max_gen_len)
        answers = [iter([result["generation"]["content"]]) for result in results]
    for dialog, pieces in zip(dialogs, answers, strict=True):
        for message in dialog:
            print_once(f"{message['role'].capitalize()}: {message['content']}\n")
        print_once("> Assistant: ", end="")
        for piece in pieces:
            print_once(piece, end="")
        print_once("\n\n==================================\n")


def main(
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    max_gen_len: int | None = None,
    stream: bool = False,
    chat_format: str | None = None,
    adapter: str | tuple[str, ...] = (),
) -> None:
    """Print a few dialogs and the model's answers; ``stream`` shows them as they come."""
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size,
        chat_format=chat_format,
        adapter=adapter,
    )
    answer(llama, DIALOGS, temperature, top_p, max_gen_len, stream)


if __name__ == "__main__":
    cli.run(main)
