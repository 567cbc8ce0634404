"""What the page takes of a browser: its own messages, and none that names a file."""

import contextlib
import os
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llama.sampling import SamplingParams

# Looked for and not imported, which takes seconds even in processes that run none of these tests.
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed")


# The values of the settings behind temperature, top-p and length.
MORE = [0, 0, 1, 0, 0, "", "", ""]


class Silent:
    """Answers nothing."""

    name = "tiny-llama"
    chat_format = "turn-based"
    infills = True
    max_tokens = 2048
    defaults = SamplingParams()

    async def chat(self, *given: Any) -> AsyncIterator[str]:
        yield ""

    complete = infill = chat


def make_client() -> Any:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from llama.server.page import mount_page

    return TestClient(mount_page(FastAPI(), Silent()))


@pytest.fixture(scope="module")
def client() -> Any:
    return make_client()


def test_no_file_of_this_machine_is_read(client: Any, tmp_path: Path) -> None:
    """A message that names one is refused, wherever the name is; the page's folder stays empty."""
    secret = tmp_path / "secret"
    secret.write_text("a secret of the user")
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    chat = {"fn_index": 0, "session_hash": "s", "data": ["", [], "", 0.6, 0.9, 0, *MORE]}
    turn = {"role": "user", "content": [{"type": "file", "file": file}]}
    messages = [{**chat, "data": [file, [], "", 0.6, 0.9, 0, *MORE]}]
    messages += [
        {**chat, "data": ["", nested, "", 0.6, 0.9, 0, *MORE]} for nested in ([file], [turn])
    ]
    messages += [{**chat, "data": ["", [], "", 0.6, 0.9, {"a": [[file]]}, *MORE]}]
    messages += [{**chat, "event_data": {"index": 0, "value": file}}, {**chat, "anything": [file]}]
    messages += [{**chat, "data": [{"path": "/dev/zero", "meta": 3}, [], "", 0.6, 0.9, 0, *MORE]}]
    for message in messages:
        answer = client.post("/gradio_api/queue/join", json=message)
        assert answer.status_code == 400, message
        assert answer.json() == {"detail": "the page takes no files"}
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_garbage_is_refused_and_leaves_no_words(
    client: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    chat = {"fn_index": 0, "session_hash": "s", "data": ["SESAME", [], "", 0.6, 0.9, 0, *MORE]}
    turns = ({"role": "SESAME", "content": ""}, {"role": "user", "content": ["SESAME"]}, "SESAME")
    wrong = [["SESAME", [turn], "", 0.6, 0.9, 0, *MORE] for turn in turns]
    wrong += [
        ["SESAME"],
        ["SESAME", [], "", "SESAME", 0.9, 0, *MORE],
        [["SESAME"], [], "", 0.6, 0.9, 0, *MORE],
    ]
    wrong += [
        ["SESAME", [], "", 0.6, 9, 0, *MORE],
        ["SESAME", [], "", 0.6, 0.9, True, *MORE],
        "SESAME",
    ]
    join: list[Any] = [{**chat, "data": data} for data in wrong]
    join += [{**chat, "fn_index": index} for index in (999, -1, 1, 2, "SESAME")]
    events = ("SESAME", {"value": "SESAME"}, {"index": "SESAME", "value": "SESAME"})
    join += [{**chat, "event_data": event} for event in events]
    for path, messages in (("queue/join", join), ("cancel", [chat, {"event_id": "SESAME"}])):
        for message in (*messages, "SESAME", ["SESAME"], None):
            assert client.post(f"/gradio_api/{path}", json=message).status_code == 400, message
        for body in (b"SESAME", b"\xffSESAME", b"[" * 50_000, b""):
            answer = client.post(f"/gradio_api/{path}", content=body)
            assert answer.status_code == 400 and "SESAME" not in answer.text
    import gradio

    with contextlib.suppress(ZeroDivisionError):
        try:
            raise ZeroDivisionError("SES" + "AME")
        finally:
            gradio.queueing.traceback.print_exc()
    assert "ZeroDivisionError" in caplog.text
    assert "SESAME" not in caplog.text + "".join(capfd.readouterr())


def test_the_page_s_folder_goes_with_it() -> None:
    with make_client():
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir()
    assert not folder.exists()
