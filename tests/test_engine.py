"""The server's engine: whatever runs beside it, a request gets what it gets alone."""

import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from conftest import make_model, passed_tokens

from llama import Llama, Tokenizer
from llama.packing import Segment
from llama.server import ranks
from llama.server.engine import Busy, Draining, Engine
from llama.server.jobs import Job, Update

PROMPTS = [
    "Once upon a time",
    "The cow",
    "Anna has a blue kite. " * 20,
    "One day a little duck went to the river and saw",
    "def add(a, b):\n",
    "Tom and Lily played in the garden. " * 9,
]


@pytest.fixture
def llama() -> Iterator[Llama]:
    yield Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=4)


class Client:
    """Submits jobs and keeps what they are told."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.updates: dict[Job, list[Update]] = {}

    def job(self, prompt: str | list[int], **settings: Any) -> Job:
        keep = {name: settings.pop(name) for name in ("n_top", "deadline") if name in settings}
        rows, request = self.engine.llama.text_rows([prompt], **settings)
        job = Job(rows[0], request, lambda update: self.updates[job].append(update), **keep)
        self.updates[job] = []
        return job

    def submit(self, prompt: str | list[int], **settings: Any) -> Job:
        job = self.job(prompt, **settings)
        self.engine.submit([job])
        return job

    def text(self, job: Job) -> str:
        return "".join(update.text for update in self.updates[job])

    def finish(self, job: Job) -> str | None:
        """How it ended; told once, and last."""
        ends = [update.finish for update in self.updates[job] if update.finish]
        assert len(ends) <= 1, "a job was told twice that it has ended"
        assert not ends or self.updates[job][-1].finish, "a job was told something after its end"
        return ends[0] if ends else None


def work_off(engine: Engine, until: Callable[[], bool] = lambda: False) -> None:
    for _ in range(5000):
        if until() or not (engine.n_active or engine.n_waiting):
            return
        engine.step()
    raise AssertionError("the engine doesn't come to an end")


@pytest.fixture
def client(llama: Llama) -> Client:
    return Client(Engine(llama, max_queue=64))


def test_a_request_gets_what_it_gets_alone(llama: Llama, client: Client) -> None:
    """Requests of all kinds come at odd times; each one's tokens are those of a call of its own."""
    rng = random.Random(5)
    jobs: list[tuple[Job, str, dict[str, Any]]] = []
    for i in range(24):
        settings = {
            "temperature": rng.choice([0, 0, 0.7, 1.2]),
            "top_p": rng.choice([0.5, 0.9, 1.0]),
            "max_gen_len": rng.choice([1, 9, 40, None]),
            "seed": i,
            "stop": rng.choice([(), (".",), ("the", " a ")]),
            "logprobs": rng.random() < 0.5,
            "prompt_lookup_num_tokens": rng.choice([0, 0, 5]),
        }
        prompt = rng.choice(PROMPTS) + rng.choice(["", " One", " Then the dog"])
        jobs.append((client.submit(prompt, **settings), prompt, settings))
        for _ in range(rng.randrange(6)):
            client.engine.step()
    work_off(client.engine)
    fresh = Llama(llama.model, llama.tokenizer, chat=llama.chat)
    for job, prompt, settings in jobs:
        alone = fresh.text_completion([prompt], **settings)[0]
        assert client.text(job) == alone["generation"], (prompt, settings)
        assert client.finish(job) == ("stop" if job.row.ended else "length")
        if settings["logprobs"]:
            assert [llama.tokenizer.token_piece(t) for t in job.row.tokens] == alone["tokens"]
            assert job.row.logprobs == pytest.approx(alone["logprobs"], abs=1e-4)


def test_a_newcomer_is_read_beside_the_others(client: Client) -> None:
    """A long prompt is read in pieces, and each pass gives the others their next token."""
    engine = client.engine
    streams = [client.submit(prompt, temperature=0, seed=1) for prompt in PROMPTS[:3]]
    while any(job.reading for job in streams):
        engine.step()
    long = client.submit("The sun was warm. " * 30, temperature=0)
    while long.reading:
        before = [len(job.row.tokens) for job in streams]
        read = long.n_read
        engine.step()
        assert long.n_read - max(read, long.n_reused) <= 64, (
            "a stream waits for more than a piece of a prompt"
        )
        assert [len(job.row.tokens) for job in streams] == [n + 1 for n in before], (
            "a stream stood still while a prompt was read"
        )


def test_first_come_first_served(client: Client) -> None:
    """More requests than rows: each takes the row that comes free first, in order."""
    jobs = [client.submit(f"{i} ducks", temperature=0, max_gen_len=5 + i) for i in range(9)]
    admitted: list[Job] = []
    while client.engine.n_active or client.engine.n_waiting:
        client.engine.step()
        admitted += [job for job in jobs if job.place >= 0 and job not in admitted]
        assert client.engine.n_active <= 4
    assert admitted == jobs
    assert all(client.finish(job) for job in jobs)


def test_the_queue_is_bounded(llama: Llama) -> None:
    client = Client(Engine(llama, max_queue=2))
    for _ in range(6):
        client.submit("The cow", temperature=0)
    with pytest.raises(Busy, match="wait already"):
        client.submit("The cow")
    client.engine.step()  # four rows are taken, two requests wait
    with pytest.raises(Busy):
        client.submit("The cow")
    work_off(client.engine)
    with pytest.raises(Busy):  # all or none
        client.engine.submit([client.job("The cow") for _ in range(7)])
    assert client.engine.n_waiting == 0
    client.submit("The cow", temperature=0)


def test_cancelled_requests_free_their_rows(client: Client) -> None:
    """At the next step, whether they are being written, read or wait; the others don't notice."""
    alone = client.submit(PROMPTS[1], temperature=0)
    work_off(client.engine)
    writing = client.submit(PROMPTS[0], temperature=0)
    other = client.submit(PROMPTS[1], temperature=0)
    work_off(client.engine, until=lambda: len(other.row.tokens) > 3)
    reading = client.submit("The sun was warm. " * 30, temperature=0)
    client.engine.step()
    more = [client.submit("The cow") for _ in range(2)]
    client.engine.step()
    assert reading.reading and more[1].place < 0
    for job in (writing, reading, more[1]):
        job.cancelled = True
    client.engine.step()
    assert [client.finish(job) for job in (writing, reading, more[1])] == ["cancelled"] * 3
    assert client.engine.n_active == 2
    work_off(client.engine)
    assert client.text(other) == client.text(alone)


def test_deadlines(client: Client) -> None:
    """A request that is late ends, in the queue as well."""
    running = client.submit("The cow", deadline=time.monotonic() + 1000)
    late = client.submit("The cow", deadline=time.monotonic() - 1)
    client.engine.step()
    assert client.finish(late) == "timeout" and client.finish(running) is None
    running.deadline = time.monotonic() - 1
    client.engine.step()
    assert client.finish(running) == "timeout" and not client.engine.n_active


def test_a_dialog_goes_on_in_its_row(
    llama: Llama, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache holds of a text isn't read again, in its row or copied from another's."""
    passed = passed_tokens(llama, monkeypatch)
    first = client.submit(PROMPTS[2], temperature=0, max_gen_len=20)
    work_off(client.engine)
    others = [client.submit(f"{i} ducks and", temperature=0, max_gen_len=4) for i in range(3)]
    work_off(client.engine)
    text = first.row.prompt + first.row.tokens
    del passed[:]
    second = client.submit([*text, 20, 30], temperature=0, max_gen_len=1)
    work_off(client.engine)
    assert second.place == first.place and sum(passed) <= 3
    assert {job.place for job in others}.isdisjoint({first.place})
    # Two at once that begin alike: one takes the row, the other a copy.
    del passed[:]
    both = [client.submit([*text, 20, i], temperature=0, max_gen_len=1) for i in (40, 50)]
    work_off(client.engine)
    assert sum(passed) == 2, "a beginning that a row holds was read again"
    for job in both:
        expected, _ = Llama(llama.model, llama.tokenizer).generate([job.row.prompt], 1, 0)
        assert job.row.tokens == expected[0]


def test_equal_prompts_are_read_once(
    llama: Llama, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the choices of one request are: the others wait for the first one's reading."""
    passed = passed_tokens(llama, monkeypatch)
    jobs = [client.job(PROMPTS[2], temperature=0, max_gen_len=1) for _ in range(4)]
    client.engine.submit(jobs)
    work_off(client.engine)
    n = len(jobs[0].row.prompt)
    assert n > 100 and sum(passed) == n + 3
    assert len({tuple(job.row.tokens) for job in jobs}) == 1


def test_rows_change_hands_by_copies_of_copies(llama: Llama, client: Client) -> None:
    """Rows are taken, copied and taken again before a pass; each answer stays the one alone."""
    rng = random.Random(11)
    for _ in range(6):
        beginnings = [PROMPTS[2], PROMPTS[5], PROMPTS[2] + PROMPTS[0]]
        prompts = [rng.choice(beginnings) + str(rng.randrange(5)) for _ in range(5)]
        jobs = [client.submit(prompt, temperature=0, max_gen_len=3) for prompt in prompts]
        work_off(client.engine)
        for job, prompt in zip(jobs, prompts, strict=True):
            alone = Llama(llama.model, llama.tokenizer).text_completion([prompt], 0, max_gen_len=3)
            assert client.text(job) == alone[0]["generation"], "a row held another's text"
            # That call has overwritten rows which the engine believes in.
        client.engine._held = [[] for _ in client.engine._held]


def test_a_cache_in_eight_bits(tiny_tokenizer: Tokenizer) -> None:
    model = make_model(vocab_size=768, max_batch_size=3)
    model.allocate_buffers(torch.device("cpu"), torch.float32, cache_in_int8=True)
    check_rows_come_and_go(Llama(model, tiny_tokenizer))


def check_rows_come_and_go(llama: Llama) -> None:
    """Rows are taken, left and copied, beside prompts that are read: each text is the one alone."""
    client = Client(Engine(llama))
    prompts = ["Once upon a time", PROMPTS[5][:90], PROMPTS[5][:90] + "a", "The cow", "One day"]
    jobs = []
    for i, prompt in enumerate(prompts * 2):
        jobs.append(client.submit(prompt, temperature=0, max_gen_len=6 + 5 * i))
        for _ in range(3):
            client.engine.step()
    work_off(client.engine)
    for i, (job, prompt) in enumerate(zip(jobs, prompts * 2, strict=True)):
        fresh = Llama(llama.model, llama.tokenizer)
        alone = fresh.text_completion([prompt], 0, max_gen_len=6 + 5 * i)[0]
        assert client.text(job) == alone["generation"], prompt


def test_scores_and_alternatives(llama: Llama, client: Client) -> None:
    """The likeliest alternatives are the log-probabilities' greatest, prompts' included."""
    settings: dict[str, Any] = {"temperature": 0, "max_gen_len": 8, "logprobs": True, "echo": True}
    first = client.submit(PROMPTS[0], n_top=3, **settings)
    client.submit(PROMPTS[2], temperature=1.0)
    work_off(client.engine)
    ids = first.row.prompt + first.row.tokens
    logprobs = llama.model(torch.tensor([ids]))[0].log_softmax(-1)
    assert first.row.prompt_logprobs[0] == 0 and first.prompt_top[0] == []
    scores = first.row.prompt_logprobs + first.row.logprobs
    tops = first.prompt_top + first.top
    assert len(scores) == len(tops) == len(ids)
    for place in range(1, len(ids)):
        row = logprobs[place - 1]
        assert scores[place] == pytest.approx(float(row[ids[place]]), abs=1e-4)
        expected = row.topk(3)
        assert [token for token, _ in tops[place]] == expected.indices.tolist()
        assert [score for _, score in tops[place]] == pytest.approx(
            expected.values.tolist(), abs=1e-4
        )


def test_vectors_beside_streams(llama: Llama, client: Client) -> None:
    """A text that is only read gives the vector that ``embed`` gives, in pieces beside a stream."""
    text = "The sun was warm. " * 20
    stream = client.submit(PROMPTS[0], temperature=0)
    client.engine.step()
    job = client.job(text, max_gen_len=0)
    job.embed = True
    client.engine.submit([job])
    work_off(client.engine)
    assert client.finish(job) == "stop" and job.vector is not None
    expected = Llama(llama.model, llama.tokenizer).embed([text])[0]
    assert torch.allclose(job.vector, expected, atol=1e-4)
    alone = Llama(llama.model, llama.tokenizer).text_completion([PROMPTS[0]], 0)[0]
    assert client.text(stream) == alone["generation"]


def test_a_pass_that_fails_ends_its_requests_alone(
    llama: Llama, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged logits end the requests at hand with an error; the next one is answered."""
    expected = client.submit("The cow", temperature=0, max_gen_len=5)
    work_off(client.engine)
    job = client.submit("The cow", temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr(llama.model, "logits", lambda h: torch.full((len(h), 768), math.nan))
        client.engine.step()
    assert client.finish(job) == "error" and not client.engine.n_active
    again = client.submit("The cow", temperature=0, max_gen_len=5)
    work_off(client.engine)
    assert client.text(again) == client.text(expected) != ""


def test_other_ranks_outlive_a_pass_that_fails(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged logits are rank 0's to tell: the others go on with the next pass, to the last."""
    work = ranks.Pass(tokens=[1, 2], segments=[Segment(0, 0, 2)], select=[1])
    message = json.dumps(asdict(work)).encode()
    messages = iter([message, b"{}", message, b""])
    monkeypatch.setattr(ranks, "_receive", lambda model: next(messages))
    damaged = iter([math.nan, 0.0])
    monkeypatch.setattr(llama.model, "logits", lambda h: torch.full((1, 768), next(damaged)))
    ranks.follow(llama.model)
    assert llama.model.n_passes == 2 and next(messages, None) is None


def test_draining(client: Client) -> None:
    """Running and waiting requests finish, new ones are refused, then the engine's run returns."""
    jobs = [client.submit("The cow", temperature=0) for _ in range(6)]
    thread = threading.Thread(target=client.engine.run)
    thread.start()
    client.engine.drain()
    with pytest.raises(Draining):
        client.submit("The cow")
    thread.join(60)
    assert not thread.is_alive()
    assert {client.finish(job) for job in jobs} <= {"stop", "length"}


def test_an_unforeseen_error_ends_the_engine(
    llama: Llama, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a dead rank does: every request is told, and new ones are refused."""
    jobs = [client.submit("The cow") for _ in range(6)]
    monkeypatch.setattr(llama.model, "forward_packed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client.engine.run()
    assert isinstance(client.engine.failure, ZeroDivisionError)
    assert [client.finish(job) for job in jobs] == ["error"] * 6
    with pytest.raises(Draining):
        client.submit("The cow")
