"""A client of the engine, as a server's loop is one."""

from collections.abc import Callable
from typing import Any

from llama import Llama
from llama.engine.engine import Engine
from llama.engine.sequence import Sequence
from llama.sampling import SamplingParams

PROMPTS = [
    "Once upon a time",
    "The cow",
    "Anna has a blue kite. " * 20,
    "One day a little duck went to the river and saw",
    "def add(a, b):\n",
    "Tom and Lily played in the garden. " * 9,
]


class Client:
    """Submits sequences to an engine that keeps streams smooth, and collects their text."""

    def __init__(self, llama: Llama):
        self.llama = llama
        self.engine = Engine(llama.model, llama.tokenizer)
        self.engine.prefill_beside_decoding = 64
        self.engine.decode = llama.engine.decode
        self.texts: dict[Sequence, str] = {}
        self.ended: list[Sequence] = []

    def sequence(self, prompt: str | list[int], **settings: Any) -> Sequence:
        sequence = self.llama.tasks.text([prompt], SamplingParams(**settings))[0]
        self.texts[sequence] = ""
        return sequence

    def submit(self, prompt: str | list[int], **settings: Any) -> Sequence:
        sequence = self.sequence(prompt, **settings)
        self.engine.submit([sequence])
        return sequence

    def step(self) -> None:
        for event in self.engine.step():
            assert event.sequence not in self.ended, "an event came after a sequence's end"
            self.texts[event.sequence] += event.text
            if event.finish_reason:
                self.ended.append(event.sequence)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        for _ in range(5000):
            if until() or not (self.engine.n_running or self.engine.n_waiting):
                return
            self.step()
        raise AssertionError("the engine doesn't come to an end")


def check_sequences_come_and_go(llama: Llama) -> None:
    """Slots are taken, freed and copied, while prompts are read: each text is the one alone."""
    client = Client(llama)
    prompts = ["Once upon a time", PROMPTS[5][:90], PROMPTS[5][:90] + "a", "The cow", "One day"]
    sequences = []
    for i, prompt in enumerate(prompts * 2):
        sequences.append(client.submit(prompt, temperature=0, max_gen_len=6 + 5 * i))
        for _ in range(3):
            client.step()
    client.run()
    for i, (sequence, prompt) in enumerate(zip(sequences, prompts * 2, strict=True)):
        fresh = Llama(llama.model, llama.tokenizer)
        alone = fresh.text_completion([prompt], 0, max_gen_len=6 + 5 * i)[0]
        assert client.texts[sequence] == alone["generation"], prompt
