"""Meta's prompts: dialogs and infilling tasks as token ids, exactly as in the models' training."""

from collections.abc import Sequence
from typing import Literal, TypedDict

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

Role = Literal["system", "user", "assistant"]


class _Content(TypedDict):
    role: Role
    content: str


class Message(_Content, total=False):
    """One turn of a dialog.

    ``destination`` has a meaning in Code Llama 70B-Instruct's format only; ``input``, the object
    of a user's instruction, in Alpaca's and the formats derived from it.
    """

    destination: str
    input: str


Dialog = Sequence[Message]

# The strings Llama 2 and Code Llama were tuned on.
# Source: https://github.com/facebookresearch/llama and https://github.com/facebookresearch/codellama
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>", "<step>")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def has_tags(dialog: Dialog, tags: Sequence[str] = SPECIAL_TAGS) -> bool:
    """Return whether a message contains text that stands for the format's structure."""
    texts = [text for m in dialog for text in (m["content"], m.get("destination", ""))]
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
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} of the dialog has no text as its 'content': {message!r}")
        for key, value in message.items():
            if not isinstance(value, str):
                raise ValueError(
                    f"message {i} of the dialog has the {key} {value!r}: expected a text"
                )
        if "role" not in message:
            raise ValueError(
                f"message {i} of the dialog has no role: known are 'system', 'user', 'assistant'"
            )


def check_dialog(dialog: Dialog) -> None:
    """Raise an error that names the message unless a dialog is well formed.

    A dialog has an optional system message, then user and assistant in turn, the user last.

    Raises:
        TypeError: it isn't a sequence of dictionaries.
        ValueError: a role, a content or the order of messages is wrong.
    """
    check_messages(dialog)
    first = int(dialog[0]["role"] == "system")
    for i, message in enumerate(dialog):
        role = message["role"]
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
    if dialog[-1]["role"] != "user":
        raise ValueError(
            f"message {len(dialog) - 1}, the dialog's last, is by {dialog[-1]['role']!r}: "
            "end with the user's, to be answered"
        )


def refuse_inputs(dialog: Dialog) -> None:
    """Raise ``ValueError``, naming the message, if one has an ``input``: for formats without."""
    for i, message in enumerate(dialog):
        if message.get("input"):
            raise ValueError(
                f"message {i} of the dialog has an 'input', for which its chat format has no "
                "place: make it part of the 'content'"
            )


def dialog_prompt_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    """Return a dialog as the prompt for its next answer.

    The turn-based format is used if the tokenizer has ``<step>``, the INST format otherwise.

    Raises:
        TypeError, ValueError: the dialog is not well formed (see ``check_dialog``).
    """
    if tokenizer.step_id is not None:
        return turn_based_tokens(tokenizer, dialog)
    return inst_tokens(tokenizer, dialog)


def inst_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    r"""Return a dialog in the format of Llama 2 and Code Llama.

    <s>[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\nUSER [/INST] ANSWER </s><s>[INST] USER [/INST]
    """
    check_dialog(dialog)
    refuse_inputs(dialog)
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        contents[:2] = [B_SYS + contents[0] + E_SYS + contents[1]]
    contents = [content.strip() for content in contents]
    tokens = []
    for user, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        turn = f"{B_INST} {user} {E_INST} {answer} "
        tokens += tokenizer.encode(turn, bos=True, eos=True)
    return tokens + tokenizer.encode(f"{B_INST} {contents[-1]} {E_INST}", bos=True, eos=False)


def turn_based_tokens(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
    r"""Return a dialog in the format of Code Llama 70B-Instruct.

    <s> Source: system\n\n SYSTEM<step> Source: user\n\n USER<step> Source: assistant\n
    Destination: user\n\n
    """
    check_dialog(dialog)
    refuse_inputs(dialog)
    if tokenizer.step_id is None:
        raise ValueError(
            "this tokenizer has no <step>: the turn-based format needs Code Llama 70B-Instruct's"
        )
    if dialog[0]["role"] != "system":
        dialog = [Message(role="system", content=""), *dialog]
    tokens = [tokenizer.bos_id]
    for message in dialog:
        tokens += _header_tokens(tokenizer, message)
        content = message["content"].strip()
        if content:
            tokens += tokenizer.encode(f"\n\n {content}", bos=False, eos=False)
        tokens.append(tokenizer.step_id)
    reply = Message(role="assistant", content="", destination="user")
    return (
        tokens + _header_tokens(tokenizer, reply) + tokenizer.encode("\n\n ", bos=False, eos=False)
    )


def _header_tokens(tokenizer: BaseTokenizer, message: Message) -> list[int]:
    header = f" Source: {message['role']}"
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
