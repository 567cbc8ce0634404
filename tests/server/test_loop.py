"""The server's loop around the engine: queue, deadlines, cancellations, ranks and its end."""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import Llama
from llama.engine.sequence import Sequence
from llama.sampling import SamplingParams
from llama.server import workers
from llama.server.loop import Draining, EngineLoop, Job, QueueFull, Update
from llama.server.workers import worker_loop

PROMPTS = ["Once upon a time", "The cow"]


@pytest.fixture
def llama() -> Iterator[Llama]:
    yield Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=4)


class Client:
    """Submits jobs and keeps their updates."""

    def __init__(self, llama: Llama, max_queue: int = 64):
        self.llama = llama
        self.loop = EngineLoop(llama.engine, max_queue)
        self.updates: dict[Job, list[Update]] = {}

    def job(self, prompt: str, deadline: float = math.inf, **settings: Any) -> Job:
        sequence = self.llama.tasks.text([prompt], SamplingParams(**settings))[0]
        job = Job(sequence, lambda update: self.updates[job].append(update), deadline)
        self.updates[job] = []
        return job

    def submit(self, prompt: str, **settings: Any) -> Job:
        job = self.job(prompt, **settings)
        self.loop.submit([job])
        return job

    def text(self, job: Job) -> str:
        return "".join(update.text for update in self.updates[job])

    def finish(self, job: Job) -> str | None:
        """How it ended; told once, and last."""
        ends = [update.finish_reason for update in self.updates[job] if update.finish_reason]
        assert len(ends) <= 1, "a job was told twice that it has ended"
        assert not ends or self.updates[job][-1].finish_reason, "an update came after the end"
        return ends[0] if ends else None

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        for _ in range(5000):
            if until() or not (self.loop.n_active or self.loop.n_waiting):
                return
            self.loop.step()
        raise AssertionError("the loop doesn't come to an end")


@pytest.fixture
def client(llama: Llama) -> Client:
    return Client(llama)


def test_the_queue_is_bounded(llama: Llama) -> None:
    client = Client(llama, max_queue=2)
    for _ in range(6):
        client.submit("The cow", temperature=0)
    with pytest.raises(QueueFull, match="wait already"):
        client.submit("The cow")
    client.loop.step()  # four slots are taken, two requests wait
    with pytest.raises(QueueFull):
        client.submit("The cow")
    client.run()
    with pytest.raises(QueueFull):  # all or none
        client.loop.submit([client.job("The cow") for _ in range(7)])
    assert client.loop.n_waiting == 0
    client.submit("The cow", temperature=0)


def test_deadlines(client: Client) -> None:
    """A request that is late ends, in the queue as well."""
    running = client.submit("The cow", deadline=time.monotonic() + 1000)
    late = client.submit("The cow", deadline=time.monotonic() - 1)
    client.loop.step()
    assert client.finish(late) == "timeout" and client.finish(running) is None
    running.deadline = time.monotonic() - 1
    client.loop.step()
    assert client.finish(running) == "timeout" and not client.loop.n_active


def test_other_ranks_outlive_a_pass_that_fails(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged logits are rank 0's to report: the others go on with the next step, to the last."""
    prompt = {"prompt": [1, 2], "params": {"temperature": 0}, "seed": "0", "max_new_tokens": 3}
    work = json.dumps({"submitted": [prompt]}).encode()
    messages = iter([work, b"", b"{}", work, b"{}", b"stop"])
    monkeypatch.setattr(workers, "broadcast_bytes", lambda *_: next(messages))
    damaged = iter([math.nan, 0.0, 0.0])
    monkeypatch.setattr(llama.model, "logits", lambda h: torch.full((1, 768), next(damaged)))
    worker_loop(llama.engine)
    # The first sequence ended with the pass that failed, and there was nothing to do after it.
    assert llama.model.n_passes == 3 and next(messages, None) is None


def test_ranks_do_the_same(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rank 0 sends lets another rank's engine make the same passes, cancellations included."""
    sent: list[bytes] = []
    passes: list[list[int]] = []
    hidden_states = llama.model.hidden_states

    def recorded(tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        passes.append(tokens.tolist())
        return hidden_states(tokens, *more)

    monkeypatch.setattr(llama.model, "hidden_states", recorded)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "parallel", SimpleNamespace(world_size=lambda: 2))
        patch.setattr(workers, "broadcast_bytes", sent.append)
        client = Client(llama)
        jobs = [client.submit(p, seed=i, stop=["cow"]) for i, p in enumerate(PROMPTS * 3)]
        jobs[4].cancelled = True  # before the engine has seen it
        client.run(until=lambda: len(jobs[0].sequence.tokens) > 3)
        jobs[1].cancelled = True
        client.submit("def add(a, b):", prompt_lookup_num_tokens=3, max_gen_len=9)
        client.run()
    first, passes[:] = list(passes), []
    llama.reset_cache()
    messages = iter([*sent, b"stop"])
    monkeypatch.setattr(workers, "broadcast_bytes", lambda *_: next(messages))
    worker_loop(Llama(llama.model, llama.tokenizer).engine)
    assert passes == first and len(first) > 10


def test_other_ranks_know_where_a_sequence_ends(llama: Llama) -> None:
    """A failure means that ranks disagree where a text ends, and wait for each other."""
    params = SamplingParams(stop=["moo"], stop_token_ids=[7], include_stop=True)
    own = frozenset({2, "\n### Human:"})
    sequence = Sequence([1], params, "0", 9, ends=own, visible={5: "<tool_call>"})
    sent = json.loads(json.dumps(workers._describe(sequence)))
    restored = workers._restore(sent, llama.engine)
    assert (restored.ends, restored.visible) == (own, {5: "<tool_call>"})
    assert restored.params == params


def test_draining(client: Client) -> None:
    """Running and waiting requests finish, new ones are refused, then the engine's run returns."""
    jobs = [client.submit("The cow", temperature=0) for _ in range(6)]
    thread = threading.Thread(target=client.loop.run)
    thread.start()
    client.loop.drain()
    with pytest.raises(Draining):
        client.submit("The cow")
    thread.join(60)
    assert not thread.is_alive()
    assert {client.finish(job) for job in jobs} <= {"stop", "length"}


def test_the_interpreter_is_handed_over_soon(client: Client) -> None:
    """A failure means that a step's operators wait for Python's 5 ms each while another thread
    parses a large request, or that the setting outlives the engine."""
    usual, found = sys.getswitchinterval(), set()
    job = client.job("The cow", max_gen_len=2)
    job.notify = lambda update: found.add(round(sys.getswitchinterval(), 5))
    client.loop.submit([job])
    client.loop.drain()
    client.loop.run()
    assert found == {0.0001} and sys.getswitchinterval() == usual


def test_an_unexpected_error_ends_the_engine(
    llama: Llama, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a dead rank does: every request is told, and new ones are refused."""
    jobs = [client.submit("The cow") for _ in range(6)]
    monkeypatch.setattr(llama.model, "hidden_states", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client.loop.run()
    assert isinstance(client.loop.failure, ZeroDivisionError)
    assert [client.finish(job) for job in jobs] == ["error"] * 6
    with pytest.raises(Draining):
        client.submit("The cow")


def test_cancelled_requests_free_their_slots(client: Client) -> None:
    """At the next step, whether they are being written, read or wait; the others don't notice."""
    alone = client.submit(PROMPTS[1], temperature=0)
    client.run()
    writing = client.submit(PROMPTS[0], temperature=0)
    other = client.submit(PROMPTS[1], temperature=0)
    client.run(until=lambda: len(other.sequence.tokens) > 3)
    reading = client.submit("The sun was warm. " * 30, temperature=0)
    client.loop.step()
    more = [client.submit("The cow") for _ in range(2)]
    client.loop.step()
    assert reading.sequence.is_prefilling and more[1].sequence.slot is None
    for job in (writing, reading, more[1]):
        job.cancelled = True
    client.loop.step()
    assert [client.finish(job) for job in (writing, reading, more[1])] == ["cancelled"] * 3
    assert client.loop.n_active == 2
    client.run()
    assert client.text(other) == client.text(alone)
