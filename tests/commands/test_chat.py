"""The chat in the terminal: what each line does, how an answer is stopped, what is kept."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import forked

from llama import Llama, Message
from llama.chat.formats import FORMATS
from llama.chat.prompts import SPECIAL_TAGS, UNSAFE_ERROR
from llama.commands import chat as terminal_chat
from llama.commands.chat import settable
from llama.engine.results import StreamPiece
from llama.sampling import SamplingParams

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "chat.py"
COW = Message(role="user", content="What does the cow say?")
MOO = Message(role="assistant", content="The cow says moo.")
METER = r"[\d,]+ of [\d,]+ in the context, [\d,]+ left"
SPEED = rf"\d+ tokens, \d+\.\d\d s to the first, \d+\.\d tokens/s; {METER}"


@pytest.fixture
def chat(tiny: Llama) -> Any:
    sampling = {"temperature": 0, "top_k": 0, "max_gen_len": None, "sampling": None}
    return terminal_chat.Chat(tiny, tiny.chat_completion_stream, sampling)


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Has a chat read lines to the end, and gives what it printed."""

    def run(chat: Any, *lines: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        terminal_chat.read_lines(chat, "")
        return capsys.readouterr().out

    return run


def answering(chat: Any, *pieces: str) -> None:
    """Have the chat answered with these pieces, whatever the message."""

    def stream(dialog: list[Message], **_: Any) -> Generator[StreamPiece, None, None]:
        for piece in pieces:
            yield StreamPiece(piece, [1])

    chat.stream = stream


def test_answers_stream_and_are_remembered(chat: Any, type_in: Callable[..., str]) -> None:
    out = type_in(chat, COW["content"], "", "What does the duck say?")
    assert re.fullmatch(
        rf"The cow says moo\.\n{SPEED}\n\nThe duck says quack\.\n{SPEED}\n\n", out
    ), f"the transcript isn't the two answers with their speed: {out!r}"
    duck = [{"role": "user", "content": "What does the duck say?"}]
    assert chat.dialog == [
        COW,
        MOO,
        *duck,
        {"role": "assistant", "content": "The duck says quack."},
    ], "the history isn't what was said"


def test_tokens_are_counted_as_the_model_wrote_them(
    chat: Any, tiny: Llama, type_in: Callable[..., str]
) -> None:
    for question in (COW["content"], "Count from 3 to 9.", "Tell me a story about a cat."):
        chat.dialog = []
        out = type_in(chat, question)
        dialog = [Message(role="user", content=question)]
        tokens = tiny.chat_completion([dialog], temperature=0, logprobs=True)[0]["tokens"]
        expected = len(tokens) + 1  # the end of the answer
        assert f"{expected} tokens, " in out, f"{expected} tokens were generated, not as in {out!r}"


def test_a_backslash_continues_a_message(chat: Any, type_in: Callable[..., str]) -> None:
    type_in(chat, "What does\\", "the cow \\", "say?", "One more\\")
    assert [m["content"] for m in chat.dialog[::2]] == ["What does\nthe cow \nsay?", "One more\n"]


def test_two_slashes_begin_a_message_with_one(chat: Any, type_in: Callable[..., str]) -> None:
    type_in(chat, "//help is a command. What does the cow say?")
    assert chat.dialog[0]["content"] == "/help is a command. What does the cow say?"


def test_system_prompt_is_set_shown_kept_and_removed(
    chat: Any, type_in: Callable[..., str]
) -> None:
    pirate = {"role": "system", "content": "You are a pirate."}
    assert "no system prompt" in type_in(chat, "/system")
    type_in(chat, COW["content"], "/system You are a pirate.")
    assert chat.dialog == [pirate, COW, MOO], "/system doesn't go in front of what was said"
    assert "You are a pirate." in type_in(chat, "/system")
    assert "Arr!" in type_in(chat, "Where does the bee live?"), "the model doesn't get it"
    type_in(chat, "/clear")
    assert chat.dialog == [pirate], "/clear keeps the system prompt and nothing else"
    type_in(chat, "/system You are\\", "a cook.")
    assert chat.dialog == [{"role": "system", "content": "You are\na cook."}]
    type_in(chat, '/system ""')
    assert chat.dialog == []


def test_unknown_commands_say_what_is_known(chat: Any, type_in: Callable[..., str]) -> None:
    for line in ("/nothing", "/", "/save", "/load"):
        out = type_in(chat, line)
        assert out.startswith(f"{line} isn't a command")
        for known in terminal_chat.HELP.split("To begin")[0].splitlines():
            assert known.split()[0] in out, f"{line} doesn't tell of {known}"
    assert chat.dialog == []
    assert type_in(chat, "/quit", COW["content"]) == "", "/quit reads on"
    assert "/load FILE" in type_in(chat, "/help")


def test_the_last_message_is_answered_again_or_taken_back(
    chat: Any, type_in: Callable[..., str]
) -> None:
    for line in ("/retry", "/undo"):
        assert type_in(chat, line) == "There is no message yet.\n\n"
    type_in(chat, "/system kind", COW["content"])
    first = list(chat.dialog)
    answering(chat, "Moo!")
    out = type_in(chat, "/retry")
    assert out.startswith("Moo!\n")
    again = {"role": "assistant", "content": "Moo!"}
    assert chat.dialog == [*first[:2], again], "/retry keeps the first answer, or the new not"
    type_in(chat, "And now?", "/undo")
    assert chat.dialog == [*first[:2], again], "/undo takes more or less than one exchange"
    answering(chat)
    assert "No answer" in type_in(chat, "/retry")
    assert chat.dialog == [*first[:2], again], "an answer that failed takes the old one with it"
    type_in(chat, "/undo")
    assert chat.dialog == first[:1], "/undo takes the system prompt"


def test_parameters_are_set_and_shown(chat: Any, type_in: Callable[..., str]) -> None:
    asked: list[dict[str, Any]] = []

    def stream(dialog: list[Message], **sampling: Any) -> Generator[StreamPiece, None, None]:
        asked.append(sampling)
        yield StreamPiece("Hm.", [1])

    chat.stream = stream
    assert type_in(chat, "/set") == (
        "temperature = 0\ntop_k = 0\nmax_gen_len = None\nsampling = None\n\n"
    )
    out = type_in(
        chat, "/set temperature 0.5", "/set max_gen_len 7", "/set sampling checkpoint", "x"
    )
    assert out.startswith("temperature = 0.5\n\nmax_gen_len = 7\n\nsampling = checkpoint\n\nHm.")
    given = {"temperature": 0.5, "top_k": 0, "max_gen_len": 7, "sampling": "checkpoint"}
    assert asked == [given], "the model doesn't get what was set"
    assert type_in(chat, "/set max_gen_len none", "/set top_k") == (
        "max_gen_len = None\n\ntop_k = 0\n\n"
    )
    for line, complaint in (
        ("/set temperature hot", "temperature is 'hot': give a number"),
        ("/set top_k -1", "top_k is -1"),
        ("/set colour 1", "colour isn't a parameter: there are temperature, top_k, max_gen_len"),
    ):
        assert complaint in type_in(chat, line)
    assert chat.sampling == {**given, "max_gen_len": None}, "a wrong value is kept"


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ('stop ["\\n", "."]', ["\n", "."]),
        ("stop ('.',)", (".",)),
        ("logit_bias {5: -100}", {5: -100}),
        ('response_format {"type": "json_object", "strict": true}', None),
        ("ignore_eos true", True),
        ("seed 7", 7),
    ],
)
def test_every_parameter_of_an_answer_can_be_set(
    chat: Any, type_in: Callable[..., str], typed: str, value: Any
) -> None:
    """A failure means that the terminal knows less than scripts, or reads values wrongly."""
    chat.sampling = settable()
    assert "isn't" not in type_in(chat, f"/set {typed}")
    name = typed.split()[0]
    if value is None:
        value = {"type": "json_object", "strict": True}
    assert chat.sampling == {**settable(), name: value}
    SamplingParams(**chat.sampling)


def test_save_clear_load(chat: Any, type_in: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "a dialog.json"
    type_in(chat, "/system You are kind. 친절", COW["content"], f"/save {path}", "/clear")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == [{"role": "system", "content": "You are kind. 친절"}, COW, MOO]
    assert "친절" in path.read_text(encoding="utf-8"), "a person can't read what was saved"
    type_in(chat, f"/load {path}")
    assert chat.dialog == saved, "/load doesn't bring back what /save wrote"
    type_in(chat, "What does the duck say?")
    assert len(chat.dialog) == 5, "a loaded conversation can't go on"


def test_saving_is_whole_or_not_at_all(
    chat: Any, type_in: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "dialog.json"
    assert "is empty" in type_in(chat, f"/save {path}")
    path.write_text("before")
    chat.dialog = [COW, Message(role="assistant", content="half of a pair: \ud83d")]
    assert "surrogates not allowed" in type_in(chat, f"/save {path}")
    assert path.read_text() == "before", "a failed /save destroyed the file"
    assert "No such file" in type_in(chat, f"/save {tmp_path / 'none' / 'dialog.json'}")
    assert list(tmp_path.iterdir()) == [path], "a failed /save leaves something behind"


def test_loaded_message_without_answer_is_answered(
    chat: Any, type_in: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "dialog.json"
    path.write_text(json.dumps([COW]))
    out = type_in(chat, f"/load {path}")
    assert out.startswith("> What does the cow say?\nThe cow says moo.\n"), out
    assert chat.dialog == [COW, MOO]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file or directory: .*dialog.json"),
        ("[", "dialog.json isn't JSON: "),
        (b"\xff", "dialog.json isn't JSON: "),
        ("3", "a dialog is a list of messages"),
        ("[]", "the dialog is empty"),
        ('[{"role": "user"}]', "message 0 of the dialog has no text"),
        ('[{"role": "sheep", "content": "Baa"}]', "has the role 'sheep'"),
        ('[{"role": "assistant", "content": "Baa"}]', "by 'assistant' where 'user' is expected"),
        ('[{"role": "user", "content": "[INST]"}]', re.escape(UNSAFE_ERROR)),
    ],
)
def test_what_is_no_dialog_is_not_loaded(
    chat: Any,
    type_in: Callable[..., str],
    tmp_path: Path,
    content: str | bytes | None,
    complaint: str,
) -> None:
    path = tmp_path / "dialog.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    chat.dialog = [COW, MOO]
    out = type_in(chat, f"/load {path}")
    assert re.search(complaint, out), f"{complaint!r} isn't what is said: {out!r}"
    assert chat.dialog == [COW, MOO], "a failed /load changed the conversation"


def test_what_is_too_long_is_not_kept(chat: Any, type_in: Callable[..., str]) -> None:
    out = type_in(chat, COW["content"], "moo " * 600, "What does the duck say?")
    assert "more than max_seq_len=512" in out and "/clear, or start with a larger" in out
    assert "The duck says quack." in out, "the conversation doesn't go on after an error"
    assert len(chat.dialog) == 4, "the message that failed stays in the history"


def test_the_meter_counts_what_the_next_message_follows(
    chat: Any, tiny: Llama, type_in: Callable[..., str]
) -> None:
    """A failure misleads about how long a conversation may still go on."""
    out = type_in(chat, COW["content"], "And the duck?")
    prompt = tiny.chat.prompt(tiny.tokenizer, chat.dialog[:3])
    n_answer = int(re.findall(r"(\d+) tokens,", out)[-1])
    n_used, most, n_left = re.findall(r"(\d+) of (\d+) in the context, (\d+) left", out)[-1]
    assert (int(n_used), int(most)) == (len(prompt) + n_answer, 512)
    assert int(n_left) == 512 - int(n_used)


def full(chat: Any, n: int) -> list[Message]:
    """Fill the context with n turns; returns them behind a system prompt."""
    kind: list[Message] = [{"role": "system", "content": "Be kind."}]
    chat.dialog = [*kind, *([COW, MOO] * n)]
    chat.dialog[1] = {"role": "user", "content": "The first message\nof all"}
    while chat.n_prompt([*chat.dialog, COW]) < 512:
        chat.dialog += [COW, MOO]
    return list(chat.dialog)


def test_the_oldest_turns_are_forgotten_by_consent(
    chat: Any, tiny: Llama, type_in: Callable[..., str]
) -> None:
    """A failure means that a conversation ends with its context, or loses turns unasked."""
    before, questions, answers = full(chat, 2), [], []

    def ask(question: str) -> str:
        questions.append(question)
        return answers.pop(0)

    chat.ask = ask
    for refusal in ("", "n", "What?"):
        answers.append(refusal)
        with pytest.raises(ValueError, match="isn't kept"):
            chat.answer([*before, COW])
        assert chat.dialog == before, "turns are forgotten although the user wants to keep them"
    answers.append("Y ")
    chat.take(COW["content"])
    assert len(questions) == 4
    n_kept = len(chat.dialog) - 3
    assert chat.dialog == [before[0], *before[len(before) - n_kept :], COW, MOO]
    assert n_kept % 2 == 0, "half of a turn is forgotten"
    n_prompt = chat.n_prompt(chat.dialog[:-1])
    assert n_prompt <= 384, "there is no room for an answer"
    assert chat.n_prompt([before[0], *before[len(before) - n_kept - 2 :], COW]) > 384, "too many"
    chat.take(COW["content"])
    assert len(questions) == 4, "it asks although there is room"


def test_what_would_be_forgotten_is_shown(chat: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = full(chat, 1)
    chat.ask = lambda question: "n"
    chat.take(COW["content"])
    out = capsys.readouterr().out
    assert "- The first message?of all\n- What does the cow say?\n" in out
    n_shown = out.count("\n- ")
    assert 0 < n_shown < len(before) // 2, "all turns are named, or none"
    assert re.search(r"5\d\d tokens, and 512 fit", out) and "isn't kept" in out

    def leave(question: str) -> str:
        raise KeyboardInterrupt

    chat.ask = leave
    chat.take(COW["content"])
    assert chat.dialog == before, "Ctrl-C is taken for consent"
    chat.ask = lambda question: pytest.fail("it asks where forgetting doesn't help")
    chat.take("moo " * 600)
    assert "more than max_seq_len=512" in capsys.readouterr().out
    assert chat.dialog == before


def test_nobody_is_asked_without_a_terminal(chat: Any, type_in: Callable[..., str]) -> None:
    """A failure means that a line of a script is taken for consent."""
    before = full(chat, 1)
    out = type_in(chat, COW["content"], "y")
    assert chat.ask is None and chat.dialog == before
    assert out.count("more than max_seq_len=512") == 2


def rendered(*pieces: str, width: int = 40, height: int = 12) -> tuple[str, str]:
    """Returns what a terminal that got the pieces of an answer shows in the end, and all it got."""
    console_module = pytest.importorskip("rich.console", reason="rich is not installed")
    from llama.commands.markdown import markdown_writer

    file = io.StringIO()
    console = console_module.Console(
        file=file, width=width, height=height, force_terminal=True, color_system=None
    )
    with markdown_writer(console) as write:
        for piece in pieces:
            write(piece)
    raw = file.getvalue()
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", raw):
        if part == "\n":
            row += 1
            lines += [""] * (row >= len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return "\n".join(line.rstrip() for line in lines).strip("\n"), raw


def test_markdown_in_the_terminal() -> None:
    """Blocks are Markdown, nothing is lost or doubled, and what is in angle brackets is text."""
    text = (
        "# Title\n\nSome **bold** text\nand <b>tags</b>.\n\n1. one\n\n2. two\n\n```python\n"
        "x = 1\n\ny = 2\n```\n\n[here](https://example.com) ![p](https://example.com/p.png)"
    )
    whole, _ = rendered(text)
    for size in (1, 3, 7):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert rendered(*pieces)[0] == whole, "the end depends on the pieces"
    assert "Title" in whole and "#" not in whole
    assert "Some bold text and <b>tags</b>." in whole
    assert re.search(r"1 one\n+ *2 two", whole), "the list isn't one"
    assert re.search(r"x = 1\n *\n *y = 2", whole) and "```" not in whole
    assert "https://example.com" in whole and "\U0001f306" not in whole


def test_the_end_of_what_is_written_is_seen() -> None:
    """A long block would otherwise be written unseen below the screen."""
    words = [f"word{i} " for i in range(200)]
    whole, raw = rendered(*words)
    assert "word199" in whole and whole.count("word0 ") == 1
    assert all(word.strip() in raw for word in words[-20:])


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One\n\nTwo", "One\n\n"),
        ("One\ntwo", ""),
        ("One\n\n", ""),
        ("\n\nOne", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("````\na\n```\n\nb", ""),
        ("- a\n\n- b\n\nc\n", "- a\n\n- b\n\n"),
        ("1. a\n\n   more\n\n2", ""),
        ("- a\n\nb\n", "- a\n\n"),
    ],
)
def test_where_a_block_ends(text: str, first: str) -> None:
    """Too early an end breaks a list or code in two."""
    pytest.importorskip("rich", reason="rich is not installed")
    from llama.commands.markdown import block_end

    assert text[: block_end(text)] == first


def test_the_formats_own_tags_are_not_kept(chat: Any, type_in: Callable[..., str]) -> None:
    for tag in SPECIAL_TAGS:
        for line in (f"Say {tag}", f"/system {tag}"):
            assert type_in(chat, line) == f"{UNSAFE_ERROR}\n\n"
            assert chat.dialog == [], f"{line!r} stays, and would stop every later answer"
    answering(chat, "A tag: ", "[INST]")
    assert UNSAFE_ERROR in type_in(chat, "Write a tag")
    assert chat.dialog == [], "an answer with a tag stays, and would stop every later one"


def test_no_answer_is_not_kept(chat: Any, type_in: Callable[..., str]) -> None:
    answering(chat)
    assert "No answer" in type_in(chat, "Hush!")
    assert chat.dialog == []


def test_answers_cannot_steer_the_terminal(chat: Any, type_in: Callable[..., str]) -> None:
    answering(chat, "a\x1b[2J\x9b2J", "\tb\n")
    out = type_in(chat, "Clear the screen")
    assert out.startswith("a\ufffd[2J\ufffd2J\tb\n"), f"control characters get through: {out!r}"


def test_turns_have_the_destination_of_their_format(
    tiny: Llama, type_in: Callable[..., str]
) -> None:
    # The embedded tokenizer lacks the format's own tokens.
    format = FORMATS["turn-based"]._replace(prompt=lambda *_: [1])
    chat = terminal_chat.Chat(
        SimpleNamespace(model=tiny.model, tokenizer=tiny.tokenizer, chat=format), None
    )
    answering(chat, "Hello!")
    type_in(chat, "Hello")
    assert chat.dialog[1]["destination"] == "user", "Code Llama 70B's answers have one"


def test_ctrl_c_stops_an_answer_and_keeps_it(chat: Any, type_in: Callable[..., str]) -> None:
    whole = chat.stream

    def stopped(dialog: list[Message], **sampling: Any) -> Iterator[str]:
        for i, piece in enumerate(whole(dialog, **sampling)):
            yield piece
            if i == 1:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    chat.stream = stopped
    out = type_in(chat, COW["content"])
    assert re.fullmatch(rf"The cow\n{SPEED}\n\n", out)
    assert chat.dialog == [COW, {"role": "assistant", "content": "The cow"}]
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C stays caught after the answer"
    chat.stream = whole
    type_in(chat, COW["content"])
    assert len(chat.dialog) == 4, "the conversation doesn't go on after a stop"


def test_ctrl_c_before_the_first_word_keeps_nothing(chat: Any, type_in: Callable[..., str]) -> None:
    def stopped(dialog: list[Message], **_: Any) -> Iterator[str]:
        signal.raise_signal(signal.SIGINT)
        yield "The"

    chat.stream = stopped
    assert type_in(chat, COW["content"]) == "Stopped: the message isn't kept.\n\n"
    assert chat.dialog == []


def test_a_second_ctrl_c_leaves(chat: Any, type_in: Callable[..., str]) -> None:
    def stuck(dialog: list[Message], **_: Any) -> Iterator[str]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield "The"

    chat.stream = stuck
    assert type_in(chat, COW["content"], "/system") == "", "a stuck answer can't be left"


def test_without_prompt_toolkit_it_says_what_would_bring_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: True)
    assert terminal_chat.line_reader() is input
    out = capsys.readouterr().out
    assert out.count("pip install 'llama[chat]'") == 1
    assert "\x1b[2m" in out, "notes aren't dim in a terminal"


def piped(n: int = 1) -> str:
    """What the script prints for two messages, one of them in two lines, and a long one."""
    done = forked(
        *(str(SCRIPT), "--temperature", "0", "--system", "kind, brief"),
        input="What does\\\nthe cow say?\n/system\n"
        f"{'moo ' * 600}\n/set max_gen_len 2\n/set logit_bias {{5: -100}}\n"
        "What does the duck say?\n"
        "/set max_gen_len none\n/retry",
        n=n,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


PIPED = (
    rf"The cow says moo\.\n{SPEED}\n\nkind, brief\n\nprompt 0 has .*\n/clear, or .*\n\n"
    rf"max_gen_len = 2\n\nlogit_bias = \{{5: -100\}}\n\nThe duck\n.*\n\nmax_gen_len = None\n\n"
    rf"The duck says quack\.\n{SPEED}\n\n"
)


@pytest.mark.slow
def test_piped_lines_are_read_to_the_end() -> None:
    out = piped()
    assert re.fullmatch(PIPED, out), f"more or less than answers, speeds and notes: {out!r}"


@pytest.mark.slow
def test_two_processes_talk_as_one() -> None:
    out = piped(n=2)
    assert re.fullmatch(PIPED, out), f"not what one process prints: {out!r}"


class Terminal:
    """A pseudo-terminal in which the script runs, with a model that takes its time."""

    SLOW = (
        "import runpy, sys, time\n"
        "from llama import Llama\n"
        "stream = Llama.chat_completion_stream\n"
        "def slow(*args, **options):\n"
        "    for piece in stream(*args, **options):\n"
        "        time.sleep(0.03)\n"
        "        yield piece\n"
        "Llama.chat_completion_stream = slow\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )

    def __init__(self) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SLOW, str(SCRIPT), "--temperature", "0"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(slave)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until something matches. Returns what came up to its end since the last call."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self._seen)):
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} isn't met in {self._seen!r}"
            try:
                came = os.read(self._master, 65536).decode()
            except OSError:  # the other side has closed
                came = ""
            assert came, f"the script left before {pattern!r}: {self._seen!r}"
            self._seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", self._seen + came)
        before, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    pytest.importorskip("pty")
    pytest.importorskip("prompt_toolkit")
    terminal = Terminal()
    yield terminal
    terminal.close()


@pytest.mark.slow
def test_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "dialog.json"
    terminal.wait_for(">")
    terminal.type("What does the cow say?\r")
    assert re.search(r"The cow says moo\. *\n", terminal.wait_for(SPEED)), "no answer is shown"
    terminal.wait_for(">")
    terminal.type("What does\x1b\rthe duck say?\r")  # Alt-Enter
    shown = terminal.wait_for(SPEED)
    assert re.search(r"The duck says quack\. *\n", shown), "Alt-Enter doesn't break a line"
    terminal.wait_for(">")

    terminal.type("Tell me a story about a cat.\r")
    begun = terminal.wait_for(r"Once upon a time.*?\w")
    terminal.type("\x03")  # Ctrl-C
    begun += terminal.wait_for(SPEED)
    terminal.wait_for(">")

    terminal.type("given up")
    terminal.wait_for("given up")
    terminal.type("\x03")
    terminal.wait_for(">")
    terminal.type(f"/save {path}\r")
    terminal.wait_for("has 6 messages")
    saved = [message["content"] for message in json.loads(path.read_text())]
    assert saved[2] == "What does\nthe duck say?", "Alt-Enter doesn't break a line"
    assert saved[5] and f"{saved[5]}\n" in begun.replace("^C", ""), (
        "what was shown when Ctrl-C came isn't kept"
    )
    terminal.wait_for(">")

    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(60) == 0, "Ctrl-D doesn't leave in peace"
