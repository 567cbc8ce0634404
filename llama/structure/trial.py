"""Tries a grammar in a worker process first, which is killed if the grammar takes too long."""

import atexit
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from llama.errors import need
from llama.structure import worker
from llama.structure.vocabulary import Vocabulary

SECONDS = 5.0  # that a grammar may take, with its first mask
_START = 60.0  # seconds that the worker may take to start and to build a vocabulary

# By its file: importing the worker from the package would import torch, which takes seconds.
_RUN = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](sys.argv[2])"

TOO_COMPLEX = (
    f"it takes more than {SECONDS:g} s, or too much memory: use fewer or simpler patterns, shorter "
    "lists of alternatives, or smaller numbers"
)


class _Worker:
    """A process that compiles one grammar at a time."""

    def __init__(self) -> None:
        folder = Path(need("llguidance", "structure", "response_format").__file__ or "").parents[1]
        self.pid = os.getpid()  # a fork of this process needs a worker of its own
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(worker.__file__), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches the parent only
        )

    @property
    def is_running(self) -> bool:
        return self.pid == os.getpid() and self._process.poll() is None

    def send(self, request: worker.Request) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self, seconds: float) -> Any:
        """Return the next reply; kill the process, and return None, if it takes longer."""
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self.close()
        return json.loads(line) if line else None

    def prepares(self, request: worker.Request, vocabulary: Vocabulary) -> bool:
        """Send a request; return whether the process has begun with it."""
        try:
            self.send(request)
            state = self.receive(_START)
            if state == "unknown vocabulary":
                pieces = [piece.decode("latin-1") for piece in vocabulary.pieces]
                self.send(request._replace(pieces=pieces))
                state = self.receive(_START)
        except OSError:
            return False
        return bool(state == "ready")

    def close(self) -> None:
        if self.is_running:
            self._process.kill()
            self._process.wait()


_lock = threading.Lock()
_worker: _Worker | None = None


def error_of(vocabulary: Vocabulary, grammar: str) -> str:
    """Return the error of compiling a grammar, "" for none; it takes a limited time.

    Raises:
        RuntimeError: the worker process doesn't start.
    """
    global _worker
    request = worker.Request(vocabulary.number, None, grammar, SECONDS)
    with _lock:
        for _ in range(2):  # one that has just ended, or was killed a moment too late
            if _worker is None or not _worker.is_running:
                _worker = _Worker()
                atexit.register(_worker.close)
            if _worker.prepares(request, vocabulary):
                error = _worker.receive(request.seconds)
                return TOO_COMPLEX if error is None else str(error)
            _worker.close()
    raise RuntimeError(
        f"the process that tries grammars doesn't start: {sys.executable} must be able to run "
        "Python with llguidance"
    )
