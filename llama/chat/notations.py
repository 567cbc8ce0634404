"""The published notations of tool calls: how models of each family write them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Notation:
    """A notation of tool calls.

    Attributes:
        name: of the notation; the parser of answers goes by it.
        begin: the mark that begins calls, where it is needed.
        marks: all marks of calls, which are part of the answer's text also where the tokenizer has
            control pieces for them.
        arguments: the name of the arguments in a call's JSON.
    """

    name: str
    begin: str
    marks: tuple[str, ...]
    arguments: str = "arguments"


# <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>, once for each call
# Source: https://github.com/NousResearch/Hermes-Function-Calling (README.md)
HERMES = Notation("hermes", "<tool_call>", ("<tool_call>", "</tool_call>"))
# {"name": ..., "parameters": {...}} as the whole answer, or after <|python_tag|>, where
# tool.call(name="value") may stand too
# Source: https://github.com/meta-llama/llama-models (models/llama3_1/prompt_format.md)
LLAMA = Notation("llama", "<|python_tag|>", ("<|python_tag|>",), "parameters")
# [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
# Source: https://github.com/mistralai/mistral-common (tokens/tokenizers/instruct.py)
MISTRAL = Notation("mistral", "[TOOL_CALLS]", ("[TOOL_CALLS]",))
# [TOOL_CALLS]name[ARGS]{...}, once for each call, in later tokenizers of the same source
MISTRAL_NAMES = Notation("mistral names", "[TOOL_CALLS]", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"))

# Other families' ways to write calls between the same marks.
_OTHERS = ("<function=", "<arg_key>", "<parameter=", "<parameter ", "<|message|>")


def find_notation(template: str) -> Notation | None:
    """Return the notation that a chat template describes or writes; None for an unknown one."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMES if "[ARGS]" in template else MISTRAL
    if any(mark in template for mark in _OTHERS):
        return None
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or ('"parameters"' in template and '{"name":' in template):
        return LLAMA
    return None
