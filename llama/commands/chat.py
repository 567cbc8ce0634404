"""A conversation with a model in the terminal: ``python -m llama chat``."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch

from llama import parallel
from llama.chat.formats import FORMATS
from llama.chat.prompts import UNSAFE_ERROR, Message, check_messages, has_tags
from llama.generation import TINY, Llama
from llama.parallel import print_once

HELP = """\
/system TEXT  set the system prompt, "" for none; without TEXT, show it
/clear        forget the conversation, keep the system prompt
/save FILE    write the conversation down, as JSON
/load FILE    go on with a conversation that was written down
/help         show this
/quit         leave, as Ctrl-D does
A message that begins with a slash is written with two. After a backslash at the end of a line the
message goes on; with prompt_toolkit, Alt-Enter breaks a line too. Ctrl-C stops an answer."""

# What a model or a file says must not steer the terminal.
SHOWN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def note(text: str) -> None:
    """Print what isn't part of the conversation, dim in a terminal."""
    dim = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = text.translate(SHOWN)
    print_once(f"\x1b[2m{text}\x1b[0m\n" if dim else f"{text}\n")


class Chat:
    """A conversation with a model; ``stream`` makes a dialog its answer, in pieces."""

    def __init__(self, llama: Llama, stream: Callable[[list[Message]], Generator[str, None, None]]):
        self.llama, self.stream = llama, stream
        self.dialog: list[Message] = []

    def take(self, text: str) -> None:
        """Do what a command says, or answer a message; an error leaves the dialog as it was."""
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
        """Do what ``HELP`` says."""
        system = [message for message in self.dialog[:1] if message["role"] == "system"]
        match name:
            case "/system" if argument:
                new = [] if argument == '""' else [Message(role="system", content=argument)]
                self.dialog = self.checked(new) + self.dialog[len(system) :]
            case "/system":
                note(system[0]["content"] if system else "There is no system prompt.")
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
                raise ValueError(f"{name} isn't a command, or lacks something. Known are:\n{HELP}")

    def checked(self, dialog: list[Message]) -> list[Message]:
        """The dialog, unless it holds the chat format's own tags, which get no answer."""
        if has_tags(dialog, self.llama.chat.tags):
            raise ValueError(UNSAFE_ERROR)
        return dialog

    def save(self, path: Path) -> None:
        """Write the dialog to a file, which then is there as a whole or as it was."""
        check_messages(self.dialog)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            text = json.dumps(self.dialog, indent=2, ensure_ascii=False)
            unfinished.write_text(f"{text}\n", encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        note(f"{path} holds {len(self.dialog)} messages.")

    def load(self, path: Path) -> None:
        """Go on with the dialog in a file; a user's message at its end is answered."""
        try:
            dialog = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} isn't JSON: {error}") from error
        check_messages(dialog)
        if dialog[-1]["role"] == "user":
            print_once(f"> {dialog[-1]['content']}".translate(SHOWN))
            return self.answer(dialog)
        # Whether a message may follow is for the model's own format to say.
        following = Message(role="user", content="?")
        self.llama.chat.prompt(self.llama.tokenizer, [*dialog, following])
        self.dialog = self.checked(dialog)
        note(f"{path} holds {len(dialog)} messages.")

    def answer(self, dialog: list[Message]) -> None:
        """Show the answer to a dialog; with it, the dialog becomes the conversation."""
        text, model = "", self.llama.model
        begin = time.perf_counter()
        with stoppable() as stops, closing(self.stream(self.checked(dialog))) as pieces:
            for piece in pieces:
                if stops:
                    break
                if not text:
                    first, passes, head = time.perf_counter(), model.n_passes, piece
                text += piece
                print_once(piece.translate(SHOWN), end="")
        if not text:
            return note(f"{'Stopped' if stops else 'No answer'}: the message isn't kept.")
        seconds = time.perf_counter() - first
        # Text doesn't tell what tokens it came as. Passes do, one for each token after the first
        # text; the last token may be the end of the answer, which is no text.
        passes = model.n_passes - passes
        n_tokens = len(self.llama.tokenizer.encode(head, bos=False, eos=False)) + passes
        rate = f", {passes / seconds:.1f} tokens/s" * bool(passes)
        print_once()
        note(f"{n_tokens} token{'s' * (n_tokens != 1)}, {first - begin:.2f} s to the first{rate}")
        reply = Message(role="assistant", content=text)
        if self.llama.chat is FORMATS["turn-based"]:
            reply["destination"] = "user"
        self.dialog = self.checked([*dialog, reply])


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Let Ctrl-C fill a list, so that it tears no forward pass apart; a second one leaves."""
    # A launcher such as torchrun takes Ctrl-C itself, and ends all of its processes.
    stops: list[int] = []

    def stop(number: int, _: object) -> None:
        stops.append(number)
        signal.signal(number, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stops
    finally:
        signal.signal(signal.SIGINT, before)


def line_reader() -> Callable[[str], str]:
    """What shows a prompt and reads a line: prompt_toolkit, where there is a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda _: input()
    note("/help tells what there is, Ctrl-D leaves.")
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        note("pip install -e '.[chat]' brings line editing, history and multi-line input.")
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


def talk(chat: Chat, text: str) -> None:
    """Give a chat a first line, and what is typed. A backslash at the end joins the next line."""
    read_line = line_reader()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            chat.take(text)
            text = read_line("> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n"
                with suppress(EOFError):
                    text += read_line(". ")
    share("")


def share(text: str = "") -> str:
    """Rank 0's text, on every rank."""
    device = parallel.detect_device()
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = int(parallel.broadcast(torch.tensor(len(data), device=device)))
    data = data if parallel.rank() == 0 else data.new_empty(length)
    return bytes(parallel.broadcast(data).tolist()).decode()


def main(
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    chat_format: str | None = None,
    adapter: str | tuple[str, ...] = (),
    quantize: str | None = None,
    system: str = "",
    seed: int = 1,
) -> None:
    """Talk with a model in the terminal; /help tells what can be typed.

    Args:
        ckpt_dir: a checkpoint of any format; the embedded one by default.
        tokenizer_path: its tokenizer, where it doesn't bring its own.
        temperature: 0 for the likeliest token each time.
        top_p: the probability that the tokens to choose from have together.
        max_seq_len: tokens of the whole conversation, at most.
        max_gen_len: tokens of an answer, at most.
        chat_format: how dialogs are written; by default as the checkpoint says.
        adapter: a LoRA adapter's directory, or several with commas between them.
        quantize: int8 or int4, for weights of as many bits.
        system: the system prompt.
        seed: of what is sampled.
    """
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size=1,
        seed=seed,
        adapter=adapter,
        chat_format=chat_format,
        quantize=quantize,
    )

    def stream(dialog: list[Message]) -> Generator[str, None, None]:
        if parallel.rank() == 0:
            share(json.dumps(dialog))
        return llama.chat_completion_stream(dialog, temperature, top_p, max_gen_len)

    if parallel.rank() == 0:
        talk(Chat(llama, stream), f"/system {system}" if system else "")
    # The other ranks read and print nothing, but take part in every answer.
    while parallel.rank() > 0 and (dialog := share()):
        with suppress(TypeError, ValueError):
            list(stream(json.loads(dialog)))
