"""Tool calls in an answer, parsed while it is written."""

import ast
import json
import re
import secrets
from collections.abc import Callable, Collection
from typing import NamedTuple

from llama.chat.call_json import ArgumentsEnd, NotACall, read_head
from llama.chat.notations import HERMES, LLAMA, MISTRAL, MISTRAL_NAMES, Notation
from llama.chat.prompts import Function, Message
from llama.chat.prompts import ToolCall as ToolCall

_SHORT = 1024  # characters that are read again with each piece


class ToolCallDelta(NamedTuple):
    """New text of a tool call, as OpenAI's streams have it: id and name come once, at first."""

    index: int  # type: ignore[assignment]  # hides tuple's method
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class AnswerDelta(NamedTuple):
    """New text of an answer: of its content, and of its calls."""

    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class AnswerParser:
    """Parses an answer in a notation of tool calls, of pieces of any lengths.

    Only what certainly belongs to a call of a known function is taken for one: JSON of another
    kind, unknown names and marks on their own stay content. Text that could still become a call
    is held back. White space around calls isn't part of the content.
    """

    def __init__(self, notation: Notation, names: Collection[str], parallel: bool = True):
        """Begin an answer.

        Args:
            notation: how calls are written.
            names: of the functions.
            parallel: whether there may be several calls; the text after the first is dropped else.
        """
        self._notation = notation
        self._names = frozenset(names)
        self._parallel = parallel
        self._text = ""  # that isn't understood yet
        self._waiting: list[str] = []  # what follows it
        self._n_waiting = 0
        self._raw = ""  # what was read of a possible call
        self._space = ""  # that ends the content so far
        self._state: Callable[[bool], bool] = self._start if notation is LLAMA else self._content
        self._in_list = False
        self._in_object = False
        self._end = ArgumentsEnd()
        self._n_calls = 0
        self._has_content = False
        self._new: list[str | ToolCallDelta] = []

    @property
    def has_calls(self) -> bool:
        """True once there is a call."""
        return self._n_calls > 0

    def push(self, text: str) -> AnswerDelta:
        """Take the answer's next piece, and return what has become certain."""
        self._waiting.append(text)
        self._n_waiting += len(text)
        # A long text that isn't understood is read again when there is much more of it.
        if len(self._text) > _SHORT and 4 * self._n_waiting < len(self._text):
            return AnswerDelta()
        self._take_waiting()
        return self._advance(final=False)

    def finish(self) -> AnswerDelta:
        """End the answer, and return what was held back."""
        self._take_waiting()
        self._advance_to_end()
        if not self.has_calls:
            self._new.append(self._space)
        self._space = ""
        return self._delta()

    def _take_waiting(self) -> None:
        self._text += "".join(self._waiting)
        self._waiting, self._n_waiting = [], 0

    def _advance(self, final: bool) -> AnswerDelta:
        while self._state(final):
            pass
        return self._delta()

    def _advance_to_end(self) -> None:
        while self._state(True):
            pass
        self._emit(self._raw + self._text)
        self._raw = self._text = ""

    def _delta(self) -> AnswerDelta:
        content = "".join(part for part in self._new if isinstance(part, str))
        calls: list[ToolCallDelta] = []
        for part in self._new:
            if isinstance(part, str):
                continue
            if calls and calls[-1].index == part.index and part.id is None:
                part = calls[-1]._replace(arguments=calls.pop().arguments + part.arguments)
            calls.append(part)
        self._new = []
        return AnswerDelta(content, tuple(calls))

    def _emit(self, text: str) -> None:
        """Add content; white space at its end waits for more."""
        shown = text.rstrip()
        if shown:
            before = self._space if self._has_content or not self.has_calls else ""
            if not before and self.has_calls and not self._has_content:
                shown = shown.lstrip()
            self._new.append(before + shown)
            self._space, self._has_content = text[len(text.rstrip()) :], True
        else:
            self._space += text

    def _call(self, name: str, arguments: str = "") -> None:
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
        short = self._notation in (MISTRAL, MISTRAL_NAMES)
        random = "".join(secrets.choice(alphabet) for _ in range(9 if short else 24))
        identity = random if short else f"call_{random}"
        arguments = arguments.encode(errors="replace").decode()  # JSON spells half a character
        self._new.append(ToolCallDelta(self._n_calls, identity, name, arguments))
        self._n_calls += 1
        self._raw = ""

    def _no_call(self) -> bool:
        self._emit(self._raw)
        self._raw = ""
        self._state = self._content
        return True

    # Each state reads some text, and returns whether there may be more to do. With ``final`` no
    # text will follow.

    def _start(self, final: bool) -> bool:
        """At the beginning of an answer that may be a call without a mark."""
        if not self._text.lstrip():
            return False
        self._state = self._object if self._text.lstrip().startswith("{") else self._content
        return True

    def _content(self, final: bool) -> bool:
        """In content, up to a mark or the beginning of one."""
        mark = self._notation.begin
        before, found, after = self._text.partition(mark)
        if found:
            self._emit(before)
            self._raw, self._text = mark, after
            self._state = self._marked
            return True
        held = 0 if final else _overlap(self._text, mark)
        self._emit(self._text[: len(self._text) - held])
        self._text = self._text[len(self._text) - held :]
        return False

    def _marked(self, final: bool) -> bool:
        """After a mark."""
        text = self._text.lstrip()
        if not text:
            return False
        self._in_list = text[0] == "[" and self._notation in (MISTRAL, MISTRAL_NAMES)
        if self._in_list:
            self._consume(self._text.index("[") + 1)
            self._state = self._object
        elif text[0] == "{" or self._notation is HERMES:
            self._state = self._object
        else:
            self._state = self._python if self._notation is LLAMA else self._named
        return True

    def _consume(self, n: int) -> None:
        self._raw += self._text[:n]
        self._text = self._text[n:]

    def _object(self, final: bool) -> bool:
        """At a call's JSON."""
        try:
            head = read_head(self._text, self._names)
        except NotACall:
            return self._no_call()
        if head is None:
            return False
        self._text = self._text[head.end :]
        if head.arguments is None:
            self._begin(head.name, in_object=True)
        else:
            self._call(head.name, head.arguments)
            self._state = self._after
        return True

    def _begin(self, name: str, in_object: bool) -> None:
        self._call(name)
        self._in_object = in_object
        self._end = ArgumentsEnd()
        self._state = self._arguments

    def _arguments(self, final: bool) -> bool:
        """In a call's arguments, which are passed on as they come."""
        end = self._end.find(self._text)
        piece = self._text[:end]
        if piece:
            self._new.append(ToolCallDelta(self._n_calls - 1, arguments=piece))
        self._text = self._text[len(piece) :]
        if end is None:
            return False
        self._state = self._rest if self._in_object else self._after
        return True

    def _rest(self, final: bool) -> bool:
        """After the arguments in a call's JSON."""
        text = self._text.lstrip()
        if not text:
            return False
        if text[0] == "}":
            self._text = text[1:]
        elif text[0] == ",":
            self._end = ArgumentsEnd(depth=1)
            self._text, self._state = text, self._other_fields
            return True
        self._state = self._after  # a brace that was forgotten ends no call
        return True

    def _other_fields(self, final: bool) -> bool:
        end = self._end.find(self._text)
        self._text = "" if end is None else self._text[end:]
        if end is None:
            return False
        self._state = self._after
        return True

    def _after(self, final: bool) -> bool:
        """After a call: at its closing mark, or at another call."""
        if not self._parallel:
            self._text = ""
            return False
        text = self._text.lstrip()
        if not text:
            return False
        if self._notation is HERMES:
            return self._after_mark(text, final)
        separator, more = (",", "{") if self._in_list else (";", "{<")
        if self._in_list and text[0] == "]":
            self._text, self._in_list = text[1:], False
        elif text[0] == separator and self._notation in (LLAMA, MISTRAL):
            following = text[1:].lstrip()
            if not following and not final:
                return False
            if following[:1] and following[0] in more:
                self._text = following
                self._raw = separator if following[0] == "{" else ""
                self._state = self._object if following[0] == "{" else self._content
                return True
        elif text[0] == "{" and self._notation is LLAMA:
            self._state = self._object
            return True
        self._state = self._content
        return True

    def _after_mark(self, text: str, final: bool) -> bool:
        mark = "</tool_call>"
        if text.startswith(mark):
            self._text = text[len(mark) :]
        elif mark.startswith(text) and not final:
            return False
        self._state = self._content
        return True

    def _named(self, final: bool) -> bool:
        """At a function's name, which Mistral's later models write before the arguments."""
        found = re.match(r"\s*([\w.-]*)", self._text)
        assert found is not None
        name, is_whole = found[1], found.end() < len(self._text)
        if not (name in self._names if is_whole else any(n.startswith(name) for n in self._names)):
            return self._no_call()
        head = re.match(r"(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)", self._text[found.end() :])
        if head is not None and is_whole:
            self._text = self._text[found.end() + head.end() :]
            self._begin(name, in_object=False)
            return True
        if re.fullmatch(r"[\w\[\]\s]{0,60}", self._text[found.end() :]) is None:
            return self._no_call()
        return False

    def _python(self, final: bool) -> bool:
        """At ``name.call(argument=value)``, which is understood at the end."""
        text = self._text.strip()
        calls = [f"{name}.call(" for name in self._names]
        if not any(text.startswith(call) or call.startswith(text) for call in calls):
            return self._no_call()
        if not final:
            return False
        parsed = _parse_python(text)
        if parsed is None or parsed[0] not in self._names:
            return self._no_call()
        self._call(*parsed)
        self._text = ""
        return False


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text begin a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def _parse_python(text: str) -> tuple[str, str] | None:
    """Return name and arguments, as JSON, of ``name.call(argument=value)``; None for other text."""
    if len(text) > 10_000:
        return None
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(not w.arg for w in call.keywords):
            return None
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        name = ast.unparse(call.func).removesuffix(".call")
        return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def answer_message(text: str, parser: AnswerParser | None) -> Message:
    """Return an answer as a message of the assistant, with its calls as the parser finds them."""
    if parser is None:
        return Message(role="assistant", content=text)
    deltas = parser.push(text), parser.finish()
    content = "".join(delta.content for delta in deltas)
    calls: list[ToolCall] = []
    for call in (call for delta in deltas for call in delta.calls):
        if call.id is not None:
            function = Function(name=call.name or "", arguments="")
            calls.append(ToolCall(id=call.id, type="function", function=function))
        calls[call.index]["function"]["arguments"] += call.arguments
    message = Message(role="assistant", content=content)
    if calls:
        message["content"] = content or None
        message["tool_calls"] = calls
    return message
