"""The options of a dialog's answer: tools, roles, the continuation of a message."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from llama.errors import checked_list, short
from llama.sampling import SamplingOptions


class ChatArguments(SamplingOptions, total=False):
    """The keyword arguments of ``Llama.chat_completion``; see ``ChatOptions``."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    continue_final_message: bool
    merge_roles: bool
    documents: Sequence[Mapping[str, Any]] | None
    max_prompt_tokens: int | None


@dataclass(frozen=True)
class ChatOptions:
    """The options of a dialog's answer.

    Args:
        tools: the functions that an answer may call, in OpenAI's form: ``{"type": "function",
            "function": {"name": ..., "description": ..., "parameters": a JSON Schema}}``.
        tool_choice: "auto" leaves it to the model whether to call one, "required" has it call,
            "none" offers none; a function's name, or OpenAI's object with it, has it call that
            one. None is "auto".
        parallel_tool_calls: whether an answer may have several calls.
        continue_final_message: continue the dialog's last message, which is the assistant's.
        merge_roles: fold orders of roles that the chat format can't hold (``llama.chat.roles``).
        documents: texts for the template's place for them, such as ``{"title": ..., "text": ...}``.
        max_prompt_tokens: of a longer prompt keep its last tokens only; None keeps all.

    Raises:
        TypeError, ValueError: a tool, the choice, a document or a number isn't of this form.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    continue_final_message: bool = False
    merge_roles: bool = False
    documents: Sequence[Mapping[str, Any]] | None = None
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tools", "documents"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, tuple(checked_list(values, name)))
        names = [_function_name(i, tool) for i, tool in enumerate(self.tools or ())]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tools has the function {min(repeated)!r} twice: names are unique")
        choice: Any = self.tool_choice
        if isinstance(choice, Mapping):
            function = choice.get("function", choice)
            named = function.get("name") if isinstance(function, Mapping) else None
            choice = named if isinstance(named, str) else choice
        if choice not in (None, "auto", "none", *(["required"] if names else []), *names):
            known = ", ".join(map(repr, names)) or "none"
            raise ValueError(
                f"tool_choice is {short(self.tool_choice, 80)}: expected 'auto', 'none', "
                f"'required' or the name of a function in tools, which are {known}"
            )
        object.__setattr__(self, "tool_choice", choice)
        if not all(isinstance(document, Mapping) for document in self.documents or ()):
            raise TypeError("documents holds something else than dictionaries: give their texts")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(
                f"max_prompt_tokens is {short(self.max_prompt_tokens)}: expected 1 or more, or None"
            )

    @property
    def offered(self) -> tuple[Mapping[str, Any], ...]:
        """The functions that an answer may call, in OpenAI's form."""
        tools, choice = tuple(self.tools or ()), self.tool_choice
        if choice == "none":
            return ()
        if choice in (None, "auto", "required"):
            return tools
        return tuple(tool for tool in tools if tool["function"]["name"] == choice)

    @property
    def must_call(self) -> bool:
        """True if an answer has to call a function."""
        return self.tool_choice not in (None, "auto", "none")


def _function_name(i: int, tool: object) -> str:
    """Return the name of the function that a tool is.

    Raises:
        TypeError, ValueError: it is none.
    """
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise TypeError(
            f"tool {i} is {short(tool, 80)}: expected {{'type': 'function', 'function': ...}}"
        )
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ValueError(f"tool {i} has no function with a name: {short(tool, 80)}")
    if not isinstance(function.get("parameters", {}), Mapping | None):
        raise TypeError(f"tool {i}, {name!r}, has parameters that are no JSON Schema: an object")
    return name


NO_OPTIONS = ChatOptions()
_OPTIONS = {field.name for field in fields(ChatOptions)}


def split_options(arguments: Mapping[str, Any]) -> tuple[ChatOptions, dict[str, Any]]:
    """Return the options of the answer, and the arguments that are left: those of sampling."""
    chat = {name: value for name, value in arguments.items() if name in _OPTIONS}
    return ChatOptions(**chat), {k: v for k, v in arguments.items() if k not in _OPTIONS}
