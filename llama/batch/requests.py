"""The requests of a file, read in windows within which equal beginnings stand together."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llama.batch.keys import Key, Keys
from llama.errors import short

WINDOW = 4096  # lines that are sorted
WINDOW_BYTES = 1 << 25  # of them, after which a window ends
MAX_LINE = 1 << 25  # bytes of a line, at most
_SORTED = 10_000  # characters of a prompt by which lines are sorted

# Of a body, in the order in which they reach a prompt.
_PROMPT_FIELDS = (
    *("model", "cache_salt", "tools", "instructions", "messages", "prompt", "input"),
    *("input_prefix", "query", "content"),
)


class Refusal(NamedTuple):
    """The error of a line that is no request, in the form that OpenAI's batches have."""

    code: str
    message: str
    line: int
    param: str | None = None


class Request(NamedTuple):
    """A line of the file.

    Args:
        key: by which later runs know that it was answered.
        size: in bytes.
        custom_id: the caller's name for it; None if it has none.
        refusal: set if there is nothing to call.
        body: JSON.
    """

    key: Key
    size: int
    custom_id: str | None
    refusal: Refusal | None = None
    url: str = ""
    body: bytes = b""


@dataclass
class Requests:
    """The lines of a file that aren't answered yet.

    Args:
        keys: those that are answered, and those that are met here.

    Attributes:
        n_answered, answered_bytes: lines that were passed over, as they are answered.
    """

    path: Path
    keys: Keys
    n_answered: int = 0
    answered_bytes: int = 0

    def windows(self) -> Iterator[list[Request]]:
        """Yield the requests in windows, each sorted by prompts. Blank lines are passed over."""
        window: list[tuple[str, Request]] = []
        n_bytes = 0
        with self.path.open("rb") as file:
            for number, (line, size) in enumerate(_lines(file), 1):
                if not line.strip():
                    continue
                request, order = self._request(number, line, size)
                if self.keys.is_answered(request.key):
                    self.n_answered += 1
                    self.answered_bytes += size
                else:
                    window.append((order, request))
                    n_bytes += size
                if len(window) == WINDOW or n_bytes >= WINDOW_BYTES:
                    yield _sorted(window)
                    window, n_bytes = [], 0
        if window:
            yield _sorted(window)

    def _request(self, number: int, line: bytes, size: int) -> tuple[Request, str]:
        """Return a line's request, and the text to sort it by."""
        try:
            fields = _parsed(line, size)
        except ValueError as error:
            return Request(number, size, None, Refusal("invalid_line", str(error), number)), ""
        name = fields["custom_id"]
        if not self.keys.meet(name):
            message = f"an earlier line has the custom_id {short(name, 80)}: give each its own"
            refusal = Refusal("duplicate_custom_id", message, number, "custom_id")
            return Request(number, size, name, refusal), ""
        try:
            body = _checked_body(fields)
        except ValueError as error:
            return Request(name, size, name, Refusal("invalid_request", str(error), number)), ""
        asked = body if isinstance(body, dict) else {}
        order = json.dumps([fields["url"], *(asked.get(field) for field in _PROMPT_FIELDS)])
        text = json.dumps(body).encode()
        return Request(name, size, name, None, fields["url"], text), order[:_SORTED]


def _sorted(window: list[tuple[str, Request]]) -> list[Request]:
    return [request for _, request in sorted(window, key=lambda pair: pair[0])]


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield each line and its size; of one that is too long, the beginning."""
    while line := file.readline(MAX_LINE + 1):
        size, part = len(line), line
        while part and not part.endswith(b"\n"):
            part = file.readline(MAX_LINE)
            size += len(part)
        yield line, size


def _parsed(line: bytes, size: int) -> dict[str, Any]:
    """Return the fields of a line.

    Raises:
        ValueError: it is no object with a custom_id.
    """
    if size > MAX_LINE:
        raise ValueError(f"the line has {size:,} bytes, more than {MAX_LINE:,}")
    try:
        fields = json.loads(line)
    except RecursionError:
        raise ValueError("the line is nested too deeply") from None
    except ValueError:
        raise ValueError("the line is not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError(f"the line is {short(fields)}: expected an object")
    name = fields.get("custom_id")
    if not isinstance(name, str) or not name:
        found = short(name) if "custom_id" in fields else "missing"
        raise ValueError(f"custom_id is {found}: expected a text that no other line has")
    return fields


def _checked_body(fields: dict[str, Any]) -> Any:
    """Return the body of a request.

    Raises:
        ValueError: the line asks for nothing that a file's answer could hold.
    """
    method, url = fields.get("method", "POST"), fields.get("url")
    if method != "POST":
        raise ValueError(f"method is {short(method)}: expected 'POST'")
    if not isinstance(url, str) or not url.startswith("/"):
        raise ValueError(f"url is {short(url, 80)}: expected a path, such as /v1/chat/completions")
    if "body" not in fields:
        raise ValueError("body is missing: expected the object that is sent to the url")
    body = fields["body"]
    if isinstance(body, dict) and body.get("stream"):
        raise ValueError("stream is set, and an answer in a file is no stream: leave it out")
    return body
