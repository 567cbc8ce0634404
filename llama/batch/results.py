"""The files of answers: appended to line by line, and read again to go on after an end."""

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llama.batch.keys import Key, Keys
from llama.batch.requests import Request

_BEGIN = b'{"id": "batch_req_'
# The beginning of each line that this command writes; answers themselves needn't be parsed.
_HEAD = re.compile(
    rb'\{"id": "batch_req_[0-9a-f]{32}", "custom_id": (null|"(?:[^"\\]|\\.)*"), "response": '
)
_REFUSED = b"null, "


def result_line(request: Request, status: int, body: bytes, name: str) -> bytes:
    """Return the line that answers a request.

    Args:
        status: of the answer; not used for a request that is refused.
        body: the answer, JSON.
        name: 32 hexadecimal digits that no other line has.
    """
    head = f'{{"id": "batch_req_{name}", "custom_id": {json.dumps(request.custom_id)}'
    if request.refusal is not None:
        error = json.dumps(request.refusal._asdict())
        return f'{head}, "response": null, "error": {error}}}\n'.encode()
    response = f'{{"status_code": {status}, "request_id": "req_{name}", "body": '
    return f'{head}, "response": {response}'.encode() + body + b'}, "error": null}\n'


def _key(line: bytes) -> Key | None:
    """Return the key of the request that a line answers; None if it isn't a line of ours."""
    head = _HEAD.match(line)
    if head is None:
        return None
    name: str | None = json.loads(head[1])
    if line.startswith(_REFUSED, head.end()):
        error = json.loads(line)["error"]
        if name is None or error["code"] == "duplicate_custom_id":
            return int(error["line"])
    return name


def answered_keys(path: Path, end: int) -> Iterator[Key]:
    """Yield the keys of the requests that the first ``end`` bytes of a file answer."""
    with path.open("rb") as file:
        while file.tell() < end:
            key = _key(file.readline())
            assert key is not None
            yield key


class _Answers:
    """A file of answers that is open for more."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Open the file, which is locked as long as the process lives.

        Raises:
            OSError: it can't be written.
            ValueError: another process has it.
        """
        self._file = self.path.open("r+b" if self.path.exists() else "x+b")
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is writing {self.path}: wait for it") from None

    def read_keys(self) -> Iterator[Key]:
        """Yield the keys of all answers, and cut off a last line that is half-written.

        Raises:
            ValueError: another program wrote a line.
        """
        assert self._file is not None
        end = self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            key = _key(line) if line.endswith(b"\n") else None
            is_cut = not line.endswith(b"\n") and _BEGIN.startswith(
                line[: len(_BEGIN)].strip(b"\0")
            )
            if key is None and not is_cut:
                raise ValueError(
                    f"{self.path} has a line {number} that isn't an answer to a request: "
                    "name another file, or delete this one"
                )
            if key is not None:
                end += len(line)
                yield key
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, line: bytes) -> None:
        if self._file is None:
            self.open()
        assert self._file is not None
        self._file.write(line)
        self._file.flush()  # to the system, which keeps it when the process is killed

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Results:
    """The answers to a file of requests, and the errors. For any thread.

    A line is with the system before the next one is written, so that a process that is killed
    loses none, and with the disk after ``sync``. A last line that is half-written is cut off when
    the file is opened again, and its request answered again.

    Attributes:
        keys: of the requests that are answered.
        n_failed: those among them that this object wrote to the errors.
    """

    def __init__(self, path: Path, errors: Path):
        """Open the files, and read which requests are answered.

        Raises:
            OSError, ValueError: a file can't be written, is another program's or in use.
        """
        self.keys = Keys()
        self.n_failed = 0
        self._lock = threading.Lock()
        self._answers, self._errors = _Answers(path), _Answers(errors)
        for file in (self._answers, self._errors) if errors.exists() else (self._answers,):
            file.open()
            for key in file.read_keys():
                self.keys.answer(key)

    def write(self, key: Key, line: bytes, failed: bool) -> None:
        """Append an answer, unless the request has one."""
        with self._lock:
            if not self.keys.answer(key):
                return
            self.n_failed += failed
            (self._errors if failed else self._answers).append(line)

    def snapshot(self) -> list[tuple[Path, int]]:
        """Return the files and their present sizes."""
        paths = [self._answers.path.resolve(), self._errors.path.resolve()]
        return [(path, path.stat().st_size) for path in paths if path.exists()]

    def sync(self) -> None:
        """Have the disk hold what was written, whatever happens to the machine."""
        self._answers.sync()
        self._errors.sync()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self._answers.close()
        self._errors.close()
