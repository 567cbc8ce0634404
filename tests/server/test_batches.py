"""Requests larger than the queue: they are worked through in parts, beside other requests."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
from processes import wait_until
from servers import idle, post, serve, slow

from llama import Llama
from llama.engine.sequence import Sequence
from llama.errors import NotFinite
from llama.guards import Verdict
from llama.sampling import SamplingParams
from llama.server import batches, service, threads
from llama.server.answers import Answers
from llama.server.batches import Batch, Batches
from llama.server.errors import ApiError
from llama.server.events import unless_disconnected
from llama.server.loop import EngineLoop, Job, QueueFull, Update

WORDS = ["cow", "duck", "bee", "dog", "cat"]
CHAT = {"messages": [{"role": "user", "content": "What does the cow say?"}], "temperature": 0}


def build(max_batch_size: int = 4) -> Llama:
    settings: dict[str, Any] = {"max_seq_len": 256, "max_batch_size": max_batch_size}
    return Llama.build(dtype=torch.float32, device="cpu", **settings)


@pytest.fixture
def llama() -> Llama:
    return build()


def test_two_thousand_inputs(tiny: Llama) -> None:
    """A failure means that clients which embed whole documents at once are refused, get another
    text's vector, or wait for a pass of each text's own."""
    texts = [f"{WORDS[i % 5]} number {i}" for i in range(2048)]
    some = [0, 1, 700, 2047]
    with serve(build(max_batch_size=32), max_queue=2) as (url, served):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found = client.embeddings.create(model="tiny", input=texts)
        assert [each.index for each in found.data] == list(range(2048))
        vectors = torch.tensor([found.data[i].embedding for i in some])
        expected = torch.nn.functional.normalize(tiny.embed([texts[i] for i in some]))
        assert torch.allclose(vectors, expected, atol=1e-5)
        assert 64 <= served.loop.counts.passes <= 80
        assert found.usage.prompt_tokens == served.loop.counts.prompt_tokens > 2048
        body = {"input": texts[:70], "encoding_format": "float"}
        answer = post(f"{url}/v1/embeddings", body).json()
    assert answer["object"] == "list" and answer["model"] == "tiny" and len(answer["data"]) == 70
    assert answer["data"][1]["embedding"] == pytest.approx(expected[1].tolist(), abs=1e-5)


@pytest.fixture
def busy(request: pytest.FixtureRequest, llama: Llama) -> Iterator[tuple[str, Any]]:
    """A server at work on a large request, whose client is about to give up."""
    slow(llama, 0.01)
    with serve(llama, max_body=1_000_000) as (url, served):

        def send() -> None:
            path, body = request.param
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/{path}", json=body, timeout=httpx.Timeout(60, read=2))

        thread = threading.Thread(target=send)
        thread.start()
        wait_until(lambda: served.loop.n_active > 1)
        yield url, served
        thread.join()
        passes = served.loop.counts.passes
        wait_until(lambda: idle(served))
        assert served.loop.counts.passes - passes < 40, "it went on without its client"


@pytest.mark.parametrize(
    "busy",
    [
        ("embeddings", {"input": ["The cow and the duck. " * 9] * 2000}),
        ("completions", {"prompt": WORDS * 9, "n": 16, "temperature": 1.5, "max_tokens": 200}),
    ],
    ids=["embeddings", "completions"],
    indirect=True,
)
def test_others_get_their_turn(busy: tuple[str, Any]) -> None:
    """A failure means that whoever asks something short waits for another's large request; or
    that this goes on when nobody waits for its answer."""
    url, served = busy
    before = served.loop.counts.passes
    answer = post(f"{url}/v1/chat/completions", {**CHAT, "max_tokens": 5})
    assert answer.json()["usage"]["completion_tokens"] == 5
    assert served.loop.counts.passes - before < 30, "it waited for long"
    assert not idle(served)


def test_a_large_request_is_prepared_with_rests(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that streams stand still while another's thousands of texts are tokenised, or
    that these take four times as long where nobody else is answered."""
    rests: list[float] = []
    clock = SimpleNamespace(sleep=rests.append, monotonic=time.monotonic)
    monkeypatch.setattr(threads, "time", clock)
    runs = [False, True, True]
    pauses = threads.Pauses(lambda: runs.pop(0))
    pauses._since -= 1
    pauses.rest()  # nothing runs
    pauses.rest()  # it has hardly worked
    assert not rests
    pauses._since -= 0.01
    pauses.rest()
    assert 0.03 <= rests.pop() < 0.1
    runs.append(True)
    pauses._since -= 1
    pauses.rest()
    assert rests.pop() == 0.1

    texts = ["The cow and the duck. " * 5] * 300
    with serve(llama, max_queue=2) as (url, served):
        for running, expected in ((0, False), (1, True)):
            monkeypatch.setattr(type(served.loop), "n_active", running)
            assert post(f"{url}/v1/embeddings", {"input": texts}).status_code == 200
            assert bool(rests) == expected


def test_many_prompts_and_answers(llama: Llama, tiny: Llama) -> None:
    """Whole or streamed, each answer is the one that the library gives, in its place."""
    prompts = [f"The {word}" for word in WORDS * 3]
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
    tiny_texts = tiny.text_completion(
        [p for p in prompts for _ in range(3)], max_gen_len=6, echo=True, **settings
    )
    body = {"prompt": prompts, "n": 3, "max_tokens": 6, "echo": True, **settings}
    with serve(llama, max_queue=1) as (url, served):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        whole = client.completions.create(model="tiny", **body)  # type: ignore[call-overload]
        texts = [""] * 45
        for chunk in client.completions.create(  # type: ignore[call-overload]
            model="tiny", stream=True, **body
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        wait_until(lambda: idle(served))
    assert [choice.index for choice in whole.choices] == list(range(45))
    assert [choice.text for choice in whole.choices] == texts
    assert texts == [each["generation"] for each in tiny_texts]
    assert whole.usage.completion_tokens <= 45 * 6


def test_refused_and_failed_ones(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that a guard's refusal, or a pass that fails, leaves the rest of a large
    request without an end, or without a place."""
    prompts = [f"The {word}" for word in WORDS * 4]
    llama.input_guard = lambda dialog: Verdict("bee" not in dialog[-1]["content"])
    llama.output_guard = lambda dialog, answer: Verdict("duck" not in dialog[-1]["content"])
    with serve(llama) as (url, served):
        body = {"prompt": prompts, "max_tokens": 4, "temperature": 0}
        found = post(f"{url}/v1/completions", body).json()["choices"]
        refused = [choice["finish_reason"] == "content_filter" for choice in found]
        assert refused == ["bee" in prompt or "duck" in prompt for prompt in prompts]
        all_refused = post(f"{url}/v1/completions", {**body, "prompt": ["The bee"] * 9})
        assert all_refused.status_code == 200
        llama.input_guard = llama.output_guard = None
        forward, n = llama.model.hidden_states, iter(range(1000))

        def failing(*args: Any) -> torch.Tensor:
            if next(n) == 9:
                raise NotFinite
            return forward(*args)

        with monkeypatch.context() as patch:
            patch.setattr(llama.model, "hidden_states", failing)
            assert post(f"{url}/v1/completions", body).status_code == 500
        late = {**body, "prompt": prompts * 100, "timeout": 0.2, "max_tokens": 200}
        assert post(f"{url}/v1/completions", late).status_code == 504
        wait_until(lambda: idle(served))
        assert served._batches.n_held == served._n_preparing_held == served._n_preparing == 0


def test_the_memory_of_large_requests_is_bounded(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that a few small bodies can ask for more answers than memory holds."""
    for module in (service, batches):
        monkeypatch.setattr(module, "MAX_HELD", 40)
    slow(llama, 0.01)
    with serve(llama) as (url, served):
        path = f"{url}/v1/completions"
        answer = post(path, {"prompt": ["a"] * 21, "n": 2})
        assert answer.status_code == 400 and "42 answers" in answer.json()["error"]["message"]
        form = {"type": "regex", "regex": "a"}
        answer = post(path, {"prompt": ["a"] * 5, "response_format": form})
        assert answer.status_code == 400 and "2 that have a form" in answer.text
        body = {"prompt": ["a"] * 20, "max_tokens": 60, "stream": True}
        with httpx.stream("POST", path, json=body, timeout=60) as stream:
            next(lines := stream.iter_lines())
            full = post(path, {"prompt": ["a"] * 21})
            assert full.status_code == 429 and full.headers["Retry-After"]
            assert post(path, {"prompt": ["a"] * 3, "max_tokens": 1}).status_code == 200
            assert post(path, {"prompt": ["a"] * 20, "max_tokens": 1}).status_code == 200
            del lines
        wait_until(lambda: idle(served))
        assert post(path, {"prompt": ["a"] * 40, "max_tokens": 1}).status_code == 200


class Submitter:
    """Submits large requests without a server, and keeps what their jobs are told."""

    def __init__(self, llama: Llama, max_queue: int = 64):
        self.llama = llama
        self.loop = EngineLoop(llama.engine, max_queue)
        self.batches = Batches(self.loop)
        self.most: dict[Batch, int] = {}  # at once in the engine

    def submit(self, n: int, deadline: float = math.inf, **settings: Any) -> list[str]:
        params = SamplingParams(temperature=0, **settings)
        return self.begin(self.llama.tasks.text(["The cow"] * n, params), deadline)

    def begin(self, sequences: list[Sequence], deadline: float = math.inf) -> list[str]:
        ends: list[str] = []

        def notify(number: int, update: Update) -> None:
            self.most[batch] = max(self.most.get(batch, 0), batch.n_submitted)
            if update.finish_reason is not None:
                ends.append(update.finish_reason)
                self.batches.go_on(batch, jobs[number], update.finish_reason)

        jobs = [
            Job(sequence, lambda update, i=i: notify(i, update), deadline)  # type: ignore[misc]
            for i, sequence in enumerate(sequences)
        ]
        batch = Batch(jobs, len(jobs))
        self.batches.begin(batch)
        return ends


def test_large_requests_share_the_slots(llama: Llama) -> None:
    """A failure means that the first of several large requests keeps the others waiting."""
    submitter = Submitter(llama)
    first = submitter.submit(12, max_gen_len=3)
    submitter.loop.step()
    assert list(submitter.most.values()) == [3], "a slot is left to others"
    second = submitter.submit(12, max_gen_len=3)
    while not second:
        submitter.loop.step()
    assert len(first) < 12 and list(submitter.most.values()) == [3, 1]
    while submitter.loop.n_active or submitter.loop.n_waiting:
        submitter.loop.step()
    assert first == second == ["length"] * 12
    assert not submitter.batches._open


def test_long_texts_are_read_one_by_one(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that what comes after a part of long texts waits for several passes."""
    monkeypatch.setattr(batches, "PREFILL_TOKENS", 100)
    submitter = Submitter(llama)
    ends = submitter.begin(llama.tasks.read(["The cow. " * 30] * 3 + ["The cow"] * 9, "mean"))
    assert submitter.loop.n_waiting == 1
    while submitter.loop.n_active or submitter.loop.n_waiting:
        submitter.loop.step()
    assert ends == ["stop"] * 12 and list(submitter.most.values()) == [4]


def test_the_rest_is_answered_while_the_server_drains(llama: Llama) -> None:
    """A failure means that a restart cuts large answers off, or never ends."""
    submitter = Submitter(llama, max_queue=0)
    ends = submitter.submit(20, max_gen_len=2)
    with pytest.raises(QueueFull):
        submitter.loop.submit([Job(each, print) for each in llama.tasks.read(["a"] * 2, "mean")])
    submitter.loop.drain()
    submitter.loop.run()
    assert ends == ["length"] * 20


def test_answers_that_are_ready_as_the_client_leaves_are_closed() -> None:
    """A failure means that a large request goes on for nobody."""
    closed: list[bool] = []

    class Ready(Answers):
        def __init__(self) -> None:
            self.close = lambda: closed.append(True)  # type: ignore[method-assign]

    class Left:
        async def receive(self) -> dict[str, str]:
            return {"type": "http.disconnect"}

    async def submit() -> Answers:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        return Ready()

    with pytest.raises(ApiError, match="closed the connection"):
        asyncio.run(unless_disconnected(Left(), submit()))  # type: ignore[arg-type]
    assert closed == [True]
