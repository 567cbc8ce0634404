"""A request's options in a chat format: the marks of calls, the form of its answer."""

from dataclasses import replace

from llama.chat.grammar import calls_grammar
from llama.chat.layout import ChatFormat
from llama.chat.notations import Notation
from llama.chat.options import ChatOptions
from llama.chat.prompts import Dialog, content_text
from llama.chat.tools import AnswerParser
from llama.sampling import SamplingParams
from llama.tokenizer import BaseTokenizer


class ChatRequest:
    """The options of a request to a chat format.

    Attributes:
        visible: the spelling of control pieces that are part of the answer's text: marks of calls.
    """

    def __init__(self, chat: ChatFormat, tokenizer: BaseTokenizer, options: ChatOptions):
        """Check the options.

        Raises:
            ValueError: the format has no place for one.
        """
        if options.documents and not chat.documents:
            raise ValueError(
                f"the chat format ({chat.name}) has no place for documents: make them part of a "
                "message"
            )
        self._options = options
        self._notation = _notation(chat, options)
        marks = () if self._notation is None else self._notation.marks
        ids = tokenizer.control_ids
        self.visible = {ids[mark]: mark for mark in marks if mark in ids}

    def continues(self, dialog: Dialog) -> bool:
        """Return whether an answer goes on in a message's text, with the space between them."""
        return self._options.continue_final_message and bool(content_text(dialog[-1]).strip())

    def params(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters of the answer, whose form the tools may decide.

        Raises:
            ValueError: ``response_format`` and the tools don't fit together.
        """
        if self._notation is None:
            return params
        grammar = calls_grammar(self._notation, self._options, params.response_format)
        if grammar is None:
            return params
        form = {"type": "grammar", "syntax": "lark", "grammar": grammar}
        return replace(params, response_format=form)


def _notation(chat: ChatFormat, options: ChatOptions) -> Notation | None:
    """Return the notation of a request's calls; None if it offers no tools."""
    if not options.offered:
        return None
    if chat.notation is None:
        raise ValueError(
            f"the chat format ({chat.name}) has no place for tools, or writes calls in a notation "
            "that isn't known: Llama.build(tool_format='hermes') describes them in the system "
            "message, and tool_choice='none' offers none"
        )
    return chat.notation


def answer_parser(chat: ChatFormat, options: ChatOptions) -> AnswerParser | None:
    """Return the parser of an answer's tool calls; None if the options offer no tools."""
    notation = _notation(chat, options)
    if notation is None:
        return None
    names = [tool["function"]["name"] for tool in options.offered]
    return AnswerParser(notation, names, options.parallel_tool_calls)
