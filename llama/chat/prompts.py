"""Meta's prompts: dialogs and infilling tasks as token ids, exactly as in the models' training."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from llama.chat.options import NO_OPTIONS, ChatOptions
from llama.errors import short
from llama.tokenizer import BaseTokenizer

__all__ = [
    "B_INST",
    "B_SYS",
    "E_INST",
    "E_SYS",
    "SPECIAL_TAGS",
    "UNSAFE_ERROR",
    "Dialog",
    "Message",
    "Role",
    "dialog_prompt_tokens",
    "infilling_prompt_tokens",
]

Role = Literal["system", "user", "assistant", "tool", "developer", "ipython"]


class Function(TypedDict):
    """A called function: its name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool, as in OpenAI's API."""

    id: str
    type: Literal["function"]
    function: Function


class _Content(TypedDict):
    role: Role
    content: str | Sequence[Mapping[str, Any]] | None


class Message(_Content, total=False):
    """One turn of a dialog.

    ``content`` is a text, or a list of ``{"type": "text", "text": ...}``; beside ``tool_calls`` it
    may be None. A message of the role "tool" has a call's result and its id, ``tool_call_id``.

    ``destination`` has a meaning in Code Llama 70B-Instruct's format only; ``input``, the object
    of a user's instruction, in Alpaca's and the formats derived from it.
    """

    destination: str
    input: str
    tool_calls: list[ToolCall]
    tool_call_id: str
    name: str


Dialog = Sequence[Message]

# The strings Llama 2 and Code Llama were tuned on.
# Source: https://github.com/facebookresearch/llama and https://github.com/facebookresearch/codellama
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>", "<step>")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def content_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content may be None or in parts."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part["text"] for part in content)


def has_tags(dialog: Dialog, tags: Sequence[str] = SPECIAL_TAGS) -> bool:
    """Return whether a message contains text that stands for the format's structure."""
    texts = [content_text(m) for m in dialog] + [
        str(value) for m in dialog for key, value in m.items() if key not in ("role", "content")
    ]
    return any(tag in text for text in texts for tag in tags)


def check_messages(dialog: Dialog) -> None:
    """Raise an error unless a dialog is a list of messages that have a role and a text.

    Raises:
        TypeError: it isn't a sequence of dictionaries.
        ValueError: it is empty, or a message has no role or content, or a value that isn't a
            string.
    """
    if not isinstance(dialog, Sequence) or not all(isinstance(m, dict) for m in dialog):
        raise TypeError(
            "a dialog is a list of messages such as {'role': 'user', 'content': 'Hello'}, and "
            f"dialogs are a list of such lists; this one is {dialog!r}"
        )
    if not dialog:
        raise ValueError("the dialog is empty: give at least one message of the user")
    for i, message in enumerate(dialog):
        calls = message.get("tool_calls")
        if not _is_content(message.get("content")) and not (calls and not message.get("content")):
            raise ValueError(f"message {i} of the dialog has no text as its 'content': {message!r}")
        if calls and message.get("role") != "assistant":
            raise ValueError(f"message {i} of the dialog has tool_calls: they are the assistant's")
        _check_calls(i, calls or ())
        for key, value in message.items():
            if not isinstance(value, str) and key not in ("content", "tool_calls"):
                raise ValueError(
                    f"message {i} of the dialog has the {key} {value!r}: expected a text"
                )
        if "role" not in message:
            raise ValueError(
                f"message {i} of the dialog has no role: known are 'system', 'user', 'assistant'"
            )


def _is_content(content: object) -> bool:
    if isinstance(content, str):
        return True
    return isinstance(content, list | tuple) and all(
        isinstance(part, Mapping)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
        for part in content
    )


def _check_calls(i: int, calls: Any) -> None:
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments", ""), str | Mapping)
            or not isinstance(call.get("id"), str | None)
        ):
            raise ValueError(
                f"message {i} of the dialog has the tool call {short(call, 80)}: expected {{'id': "
                "..., 'type': 'function', 'function': {'name': ..., 'arguments': JSON}}"
            )


def check_dialog(dialog: Dialog, continued: bool = False) -> None:
    """Raise an error that names the message unless a dialog is well formed.

    A dialog has an optional system message, then user and assistant in turn, the user last; or,
    if its last message is to be ``continued``, the assistant.

    Raises:
        TypeError: it isn't a sequence of dictionaries.
        ValueError: a role, a content or the order of messages is wrong.
    """
    check_messages(dialog)
    first = int(dialog[0]["role"] in ("system", "developer"))
    for i, message in enumerate(dialog):
        role = "system" if message["role"] == "developer" else message["role"]
        if role == "tool" or message.get("tool_calls"):
            found = "the role 'tool'" if role == "tool" else "tool_calls"
            raise ValueError(
                f"message {i} of the dialog has {found}, for which its chat format has no place: "
                "Llama.build(tool_format='hermes') writes them as text"
            )
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"message {i} of the dialog has the role {role!r}: "
                "known are 'system', 'user' and 'assistant'"
            )
        destination = message.get("destination", "")
        if len(destination.splitlines()) > 1:
            raise ValueError(
                f"message {i} of the dialog has the destination {destination!r}: expected a name"
            )
        if role != "user" and message.get("input"):
            raise ValueError(
                f"message {i} of the dialog has the input {message['input']!r} and is by {role!r}: "
                "inputs belong to the user's messages"
            )
        expected = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        if role != expected:
            raise ValueError(
                f"message {i} of the dialog is by {role!r} where {expected!r} is expected: "
                "after a system message, which is optional and first, user and assistant alternate"
            )
    check_last(dialog, continued)
    if not continued and dialog[-1]["role"] != "user":
        raise ValueError(
            f"message {len(dialog) - 1}, the dialog's last, is by {dialog[-1]['role']!r}: "
            "end with the user's, to be answered"
        )


def check_last(dialog: Dialog, continued: bool) -> None:
    """Raise ``ValueError`` if a dialog's last message is to be continued and isn't an answer."""
    last = dialog[-1]
    if continued and (last["role"] != "assistant" or last.get("tool_calls")):
        found = "calls tools" if last.get("tool_calls") else f"is by {last['role']!r}"
        raise ValueError(
            f"message {len(dialog) - 1}, the dialog's last, {found}: continue_final_message "
            "continues a text of the assistant's"
        )


def refuse_inputs(dialog: Dialog) -> None:
    """Raise ``ValueError``, naming the message, if one has an ``input``: for formats without."""
    for i, message in enumerate(dialog):
        if message.get("input"):
            raise ValueError(
                f"message {i} of the dialog has an 'input', for which its chat format has no "
                "place: make it part of the 'content'"
            )


def dialog_prompt_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    """Return a dialog as the prompt for its next answer.

    The turn-based format is used if the tokenizer has ``<step>``, the INST format otherwise.

    Raises:
        TypeError, ValueError: the dialog is not well formed (see ``check_dialog``).
    """
    if tokenizer.step_id is not None:
        return turn_based_tokens(tokenizer, dialog, options)
    return inst_tokens(tokenizer, dialog, options)


def inst_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in the format of Llama 2 and Code Llama.

    <s>[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\nUSER [/INST] ANSWER </s><s>[INST] USER [/INST]
    """
    check_dialog(dialog, options.continue_final_message)
    refuse_inputs(dialog)
    contents = [content_text(message) for message in dialog]
    if dialog[0]["role"] in ("system", "developer"):
        contents[:2] = [B_SYS + contents[0] + E_SYS + contents[1]]
    contents = [content.strip() for content in contents]
    begun = [contents.pop()] if options.continue_final_message else []
    tokens = []
    for user, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        turn = f"{B_INST} {user} {E_INST} {answer} "
        tokens += tokenizer.encode(turn, bos=True, eos=True)
    last = f"{B_INST} {contents[-1]} {E_INST}" + "".join(f" {text}" for text in begun if text)
    return tokens + tokenizer.encode(last, bos=True, eos=False)


def turn_based_tokens(
    tokenizer: BaseTokenizer, dialog: Dialog, options: ChatOptions = NO_OPTIONS
) -> list[int]:
    r"""Return a dialog in the format of Code Llama 70B-Instruct.

    <s> Source: system\n\n SYSTEM<step> Source: user\n\n USER<step> Source: assistant\n
    Destination: user\n\n
    """
    check_dialog(dialog, options.continue_final_message)
    refuse_inputs(dialog)
    if tokenizer.step_id is None:
        raise ValueError(
            "this tokenizer has no <step>: the turn-based format needs Code Llama 70B-Instruct's"
        )
    if dialog[0]["role"] not in ("system", "developer"):
        dialog = [Message(role="system", content=""), *dialog]
    begun = ""
    if options.continue_final_message:
        *dialog, last = dialog
        begun = content_text(last).strip()
    tokens = [tokenizer.bos_id]
    for message in dialog:
        tokens += _header_tokens(tokenizer, message)
        content = content_text(message).strip()
        if content:
            tokens += tokenizer.encode(f"\n\n {content}", bos=False, eos=False)
        tokens.append(tokenizer.step_id)
    reply = Message(role="assistant", content="", destination="user")
    start = tokenizer.encode(f"\n\n {begun}", bos=False, eos=False)
    return tokens + _header_tokens(tokenizer, reply) + start


def _header_tokens(tokenizer: BaseTokenizer, message: Message) -> list[int]:
    role = "system" if message["role"] == "developer" else message["role"]
    header = f" Source: {role}"
    if "destination" in message:
        header += f"\nDestination: {message['destination'].strip()}"
    return tokenizer.encode(header, bos=False, eos=False)


def infilling_prompt_tokens(
    tokenizer: BaseTokenizer, prefix: str, suffix: str, suffix_first: bool = False
) -> list[int]:
    """Return the prompt for the text between ``prefix`` and ``suffix``.

    The order is prefix, suffix, middle; with ``suffix_first`` it is suffix, prefix, middle
    (Code Llama, section 2.3, https://arxiv.org/abs/2308.12950).

    Raises:
        ValueError: the tokenizer has no infilling pieces.
    """
    pre, mid, suf = tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id
    if pre is None or mid is None or suf is None:
        raise ValueError(
            "this tokenizer has no infilling pieces (▁<PRE>, ▁<SUF>, ▁<MID>): infilling needs a "
            "model trained for it, such as Code Llama 7B or 13B"
        )
    prefix_tokens = tokenizer.encode(prefix, bos=False, eos=False)
    suffix_tokens = tokenizer.encode_infilling(suffix)
    if suffix_first:
        return [tokenizer.bos_id, pre, suf, *suffix_tokens, mid, *prefix_tokens]
    return [tokenizer.bos_id, pre, *prefix_tokens, suf, *suffix_tokens, mid]
