"""A conversation with a model in the terminal: ``python -m llama chat``."""

import ast
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llama import parallel
from llama.chat.prompts import (
    UNSAFE_ERROR,
    Dialog,
    Message,
    check_messages,
    content_text,
    has_tags,
)
from llama.commands.context import agrees, n_to_forget, names_of_turns, without_oldest
from llama.commands.flags import BuildFlags, SamplingFlags
from llama.engine.results import StreamPiece
from llama.generation import Llama
from llama.parallel import print_once
from llama.sampling import SamplingOptions, SamplingParams

HELP = """\
/system TEXT     set the system prompt, "" for none; without TEXT, show it
/retry           answer the last message again
/undo            take back the last message and its answer
/set NAME VALUE  change a parameter of sampling; without NAME, show all of them
/clear           forget the conversation, keep the system prompt
/save FILE       save the conversation as JSON
/load FILE       continue a saved conversation
/help            show this
/quit            leave, as Ctrl-D does
To begin a message with a slash, type two. A backslash at the end of a line continues the message
on the next line; with prompt_toolkit, so does Alt-Enter. Ctrl-C stops an answer."""

# Replaced in output, so that neither a model nor a file sends them to the terminal.
_CODES = (*range(32), *range(127, 160))
CONTROL_CHARACTERS = {code: "\ufffd" for code in _CODES if chr(code) not in "\n\t"}


def note(text: str) -> None:
    """Print text that isn't part of the conversation, dim in a terminal."""
    dim = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = text.translate(CONTROL_CHARACTERS)
    print_once(f"\x1b[2m{text}\x1b[0m\n" if dim else f"{text}\n")


Pieces = Generator[StreamPiece, None, None]


class Chat:
    """A conversation with a model.

    Args:
        stream: yields the answer to a dialog in pieces, with parameters of sampling.
        sampling: these parameters.

    Attributes:
        ask: shows a question and returns what is typed; None if nobody can be asked.
    """

    def __init__(
        self, llama: Llama, stream: Callable[..., Pieces], sampling: Mapping[str, Any] | None = None
    ):
        self.llama, self.stream = llama, stream
        self.sampling = dict(sampling or {})
        self.dialog: list[Message] = []
        self.ask: Callable[[str], str] | None = None

    def take(self, text: str) -> None:
        """Run a command, or answer a message; an error leaves the dialog as it was."""
        name, *argument = text.split(maxsplit=1) or [""]
        try:
            if name.startswith("/") and not name.startswith("//"):
                self.command(name, "".join(argument).strip())
            elif name:
                content = text.replace("//", "/", 1) if name.startswith("//") else text
                self.answer([*self.dialog, Message(role="user", content=content)])
        except (OSError, TypeError, ValueError) as error:
            hint = "\n/clear, or start with a larger --max_seq_len." * ("max_seq_len" in str(error))
            note(f"{error}{hint}")

    def command(self, name: str, argument: str) -> None:
        """Run a command of ``HELP``."""
        system = [message for message in self.dialog[:1] if message["role"] == "system"]
        match name:
            case "/system" if argument:
                new = [] if argument == '""' else [Message(role="system", content=argument)]
                self.dialog = self.checked(new) + self.dialog[len(system) :]
            case "/system":
                note(content_text(system[0]) if system else "There is no system prompt.")
            case "/retry":
                self.answer(self.dialog[: self.last_message() + 1])
            case "/undo":
                self.dialog = self.dialog[: self.last_message()]
            case "/set":
                self.set(*argument.split(maxsplit=1))
            case "/clear":
                self.dialog = system
            case "/save" if argument:
                self.save(Path(argument).expanduser())
            case "/load" if argument:
                self.load(Path(argument).expanduser())
            case "/help":
                note(HELP)
            case "/quit":
                raise EOFError
            case _:
                raise ValueError(
                    f"{name} isn't a command, or lacks an argument. There are:\n{HELP}"
                )

    def last_message(self) -> int:
        """Return the place of the user's last message in the dialog.

        Raises:
            ValueError: there is none.
        """
        places = [i for i, message in enumerate(self.dialog) if message["role"] == "user"]
        if not places:
            raise ValueError("There is no message yet.")
        return places[-1]

    def set(self, name: str = "", value: str | None = None) -> None:
        """Set a parameter of sampling; or, without a value, show it, or all.

        Raises:
            TypeError, ValueError: there is no such parameter, or it can't have this value.
        """
        if name not in ("", *self.sampling):
            raise ValueError(f"{name} isn't a parameter: there are {', '.join(self.sampling)}")
        if name and value is not None:
            parsed: Any = None if value.lower() == "none" else value
            for read in (json.loads, ast.literal_eval):
                with suppress(ValueError, SyntaxError):
                    parsed = read(value)
            changed = {**self.sampling, name: parsed}
            SamplingParams(**changed)  # raises for a wrong value
            ast.literal_eval(repr(changed))  # as other ranks read it, which know no infinity
            self.sampling = changed
        shown = self.sampling if not name else {name: self.sampling[name]}
        note("\n".join(f"{key} = {value}" for key, value in shown.items()))

    def checked(self, dialog: list[Message]) -> list[Message]:
        """Return the dialog.

        Raises:
            ValueError: it contains the chat format's own tags.
        """
        if has_tags(dialog, self.llama.chat.tags):
            raise ValueError(UNSAFE_ERROR)
        return dialog

    def save(self, path: Path) -> None:
        """Write the dialog to a file, which is either written as a whole or unchanged."""
        check_messages(self.dialog)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            text = json.dumps(self.dialog, indent=2, ensure_ascii=False)
            temporary.write_text(f"{text}\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        note(f"{path} has {len(self.dialog)} messages.")

    def load(self, path: Path) -> None:
        """Continue the dialog in a file; a user message at its end is answered."""
        try:
            dialog = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} isn't JSON: {error}") from error
        check_messages(dialog)
        if dialog[-1]["role"] == "user":
            print_once(f"> {dialog[-1]['content']}".translate(CONTROL_CHARACTERS))
            return self.answer(dialog)
        # The model's format raises if no message may follow.
        following = Message(role="user", content="?")
        self.llama.chat.prompt(self.llama.tokenizer, [*dialog, following])
        self.dialog = self.checked(dialog)
        note(f"{path} has {len(dialog)} messages.")

    def pieces(self, dialog: list[Message]) -> Pieces:
        """Return the pieces of the answer to a dialog."""
        return self.stream(self.checked(dialog), **self.sampling)

    def n_prompt(self, dialog: Dialog) -> int:
        """Return the number of tokens of a dialog that is to be answered."""
        return len(self.llama.chat.prompt(self.llama.tokenizer, dialog))

    def fitting(self, dialog: list[Message]) -> list[Message]:
        """Return the dialog; if it leaves no room for an answer, without its oldest turns.

        Raises:
            ValueError: the user wants to keep them.
        """
        most, n_tokens = self.llama.model.params.max_seq_len, self.n_prompt(dialog)
        n_oldest = 0
        if self.ask is not None and n_tokens >= most:
            n_oldest = n_to_forget(dialog, self.n_prompt, most)
        if self.ask is None or not n_oldest:
            return dialog  # too long a message is told by an error
        note(
            f"The context is full: {n_tokens:,} tokens, and {most:,} fit. These turns would be "
            f"forgotten:\n{names_of_turns(dialog, n_oldest)}"
        )
        if not agrees(self.ask):
            raise ValueError("The message isn't kept. /undo takes back a turn, /clear all of them.")
        return without_oldest(dialog, n_oldest)

    def answer(self, dialog: list[Message]) -> None:
        """Show the answer to a dialog, and continue the conversation with both."""
        dialog = self.fitting(self.checked(dialog))
        n_prompt, most = self.n_prompt(dialog), self.llama.model.params.max_seq_len
        text, n_tokens, n_first = "", 0, 0
        begin = time.perf_counter()
        with (
            interruptible() as stops,
            closing(self.pieces(dialog)) as pieces,
            answer_writer() as write,
        ):
            for piece in pieces:
                if stops:
                    break
                if not text:
                    first, n_first = time.perf_counter(), len(piece.token_ids)
                text += piece
                n_tokens += len(piece.token_ids) + (piece.finish_reason == "stop")  # its last one
                write(piece.translate(CONTROL_CHARACTERS))
        if not text:
            return note(f"{'Stopped' if stops else 'No answer'}: the message isn't kept.")
        seconds = time.perf_counter() - first
        n_later = n_tokens - n_first
        rate = f", {n_later / seconds:.1f} tokens/s" * bool(n_later)
        n_used = n_prompt + n_tokens
        note(
            f"{n_tokens} token{'s' * (n_tokens != 1)}, {first - begin:.2f} s to the first{rate}; "
            f"{n_used:,} of {most:,} in the context, {max(0, most - n_used):,} left"
        )
        reply = Message(role="assistant", content=text)
        if self.llama.chat.name == "turn-based":
            reply["destination"] = "user"
        self.dialog = self.checked([*dialog, reply])


@contextmanager
def answer_writer() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the next piece of an answer, in a terminal as Markdown."""
    if parallel.rank() == 0 and sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.console import Console

        from llama.commands.markdown import markdown_writer

        console = Console(highlight=False)
        if not console.is_dumb_terminal:
            with markdown_writer(console) as write:
                yield write
            return
    n_written = 0

    def write_plain(piece: str) -> None:
        nonlocal n_written
        n_written += len(piece)
        print_once(piece, end="")

    yield write_plain
    if n_written:
        print_once()


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Append to a list on Ctrl-C, so that no forward pass is interrupted; a second one raises."""
    # A launcher such as torchrun handles Ctrl-C itself, and ends all of its processes.
    stops: list[int] = []

    def stop(number: int, _: object) -> None:
        stops.append(number)
        signal.signal(number, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stops
    finally:
        signal.signal(signal.SIGINT, before)


def is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def line_reader() -> Callable[[str], str]:
    """Return a function that shows a prompt and reads a line, with prompt_toolkit in a terminal."""
    if not is_terminal():
        return lambda _: input()
    note("/help lists the commands, Ctrl-D leaves.")
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        note("pip install 'llama[chat]' installs line editing, history and multi-line input.")
        return input
    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys)

    def read_line(prompt: str) -> str:
        while True:
            try:
                return session.prompt(prompt)
            except KeyboardInterrupt:
                if not session.default_buffer.text:
                    raise

    return read_line


def read_lines(chat: Chat, text: str) -> None:
    """Pass a chat a first line, then those that are typed. A backslash continues a line."""
    read_line = line_reader()
    chat.ask = read_line if is_terminal() else None
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            chat.take(text)
            text = read_line("> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n"
                with suppress(EOFError):
                    text += read_line(". ")
    broadcast_text("")


def broadcast_text(text: str = "") -> str:
    """Return rank 0's text, on every rank."""
    device = parallel.detect_device()
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = int(parallel.broadcast(torch.tensor(len(data), device=device)))
    data = data if parallel.rank() == 0 else data.new_empty(length)
    return bytes(parallel.broadcast(data).tolist()).decode()


def settable() -> dict[str, Any]:
    """Return the parameters that /set knows, with their defaults."""
    defaults = {f.name: f.default for f in fields(SamplingParams)} | {"logit_bias": {}}
    names = SamplingOptions.__annotations__.keys() - {"n", "logits_processor", "cache_salt"}
    return {name: value for name, value in defaults.items() if name in names}


def main(
    build: BuildFlags,
    sampling: SamplingFlags,
    chat_format: str | None = None,
    chat_template: str | None = None,
    system: str = "",
) -> None:
    """Chat with a model in the terminal; /help lists the commands.

    Args:
        chat_format: how dialogs are written; by default as the checkpoint says.
        chat_template: a file with a template in Jinja's language, instead of the checkpoint's.
        system: the system prompt.
    """
    llama = Llama.build(
        **vars(build),
        max_batch_size=1,
        chat_format=chat_format,
        chat_template=chat_template,
    )

    def stream(dialog: list[Message], **sampling: Any) -> Pieces:
        if parallel.rank() == 0:
            broadcast_text(repr([dialog, sampling]))  # JSON has no numbers as keys
        return llama.chat_completion_stream(dialog, **sampling)

    if parallel.rank() == 0:
        chat = Chat(llama, stream, {**settable(), **vars(sampling)})
        read_lines(chat, f"/system {system}" if system else "")
    # The other ranks read and print nothing, but take part in every answer.
    while parallel.rank() > 0 and (request := broadcast_text()):
        dialog, changed = ast.literal_eval(request)
        with suppress(TypeError, ValueError):
            list(stream(dialog, **changed))
