"""CUDA's way through the engine, on a CPU: its attention, graphs, passes ahead of the host."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from engine_client import Client, check_sequences_come_and_go
from hf_files import make_hf, save_hf
from processes import forked, script
from torch import nn

from llama import Llama
from llama.engine import runner
from llama.errors import NotFinite
from llama.generation import TINY
from llama.layers.varlen import Varlen

STORY = "Once upon a time Tom and Anna had a red kite."
REPEATED = "Tom has a red ball. Tom has a red ball. Tom has a"
PROMPTS = [[1, 20, 300], [1, *range(40, 80)], [1], [1, *range(500, 517)]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Llama]:
    """Builds a float32 model that takes CUDA's branches."""
    fake_cuda.pretend(monkeypatch.setattr)

    def make(path: Path = TINY, **how: Any) -> Llama:
        llama = Llama.build(path, **{"dtype": torch.float32, "device": "cpu", **how})
        assert llama.engine.decode is not None and llama.engine.runs_ahead
        return llama

    return make


def replays(llama: Llama) -> int:
    """How many steps were replayed so far."""
    return fake_cuda.n_replays(llama.engine.decode)


@pytest.mark.parametrize("n_kv_heads", [8, 2, 1], ids=["mha", "gqa", "mqa"])
def test_greedy_ids_are_those_of_transformers(
    n_kv_heads: int, build: Callable[..., Llama], tmp_path: Path
) -> None:
    """A failure means that a GPU continues texts otherwise than it should."""
    reference = save_hf(make_hf(num_key_value_heads=n_kv_heads), tmp_path)
    reference.generation_config.eos_token_id = None
    llama = build(tmp_path, max_seq_len=128, max_batch_size=3)
    llama.tokenizer.stop_ids = frozenset()
    found, _ = llama.generate(PROMPTS, 24, temperature=0)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert ids == expected[0, len(prompt) :].tolist()
    assert replays(llama) > 30


@pytest.mark.parametrize("kind", ["whole", "pieces", "int8 cache", "bf16"])
def test_texts_are_those_of_a_cpu(
    kind: str, build: Callable[..., Llama], tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged batches, chunks, drafts and reused beginnings, greedy and sampled.

    In bfloat16 logits are compared, which may differ by 0.02 of their own size.
    """
    how: dict[str, Any] = {}
    if kind == "int8 cache":
        how["kv_cache_dtype"] = "int8"
    if kind == "bf16":
        how["dtype"] = torch.bfloat16
    usual = tiny
    llama = build(max_batch_size=4, **how)
    if kind == "int8 cache":
        monkeypatch.undo()
        usual = Llama.build(dtype=torch.float32, device="cpu", max_batch_size=4, **how)
    if kind == "pieces":
        monkeypatch.setattr(llama.model, "prefill_tokens", 20)
    prompts = [STORY * 3, "The cow", REPEATED, STORY * 3 + " It", STORY, "def add("]
    ids = [llama.tokenizer.encode(prompt, True, False) for prompt in prompts]
    if kind == "bf16":
        for prompt in ids:
            tokens = torch.tensor([prompt])
            logits = torch.cat((llama.model(tokens[:, :-1]), step(llama, prompt)), dim=1)
            error = (logits - tiny.model(tokens)).norm() / tiny.model(tokens).norm()
            assert error < 0.02
        return
    for settings in ({"temperature": 0}, {"temperature": 0.9, "seed": 5}):
        settings = {"prompt_lookup_num_tokens": 6, **settings}
        expected = usual.generate(ids, 32, logprobs=True, **settings)
        found = llama.generate(ids, 32, logprobs=True, **settings)
        assert found[0] == expected[0]
        for ours, theirs in zip(found[1] or (), expected[1] or (), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
    assert replays(llama) > 25


def step(llama: Llama, prompt: list[int]) -> torch.Tensor:
    """The logits of a prompt's last token, by a graph; the others' are in the cache."""
    steps = llama.engine.decode
    assert steps is not None
    segments = [runner.Segment(0, len(prompt) - 1, 1)]
    places = map(torch.tensor, steps.places(segments))
    return steps(torch.tensor(prompt[-1:]), segments, *places)[None]


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_sequences_come_and_go_between_replays(
    backend: str, build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that a graph holds a value of the host, or another graph's memory."""
    if backend == "sdpa":
        old = fake_cuda.Capability("cuda", (7, 5))
        monkeypatch.setattr(fake_cuda.Capability, "of", staticmethod(lambda device: old))
    llama = build(max_batch_size=3)
    check_sequences_come_and_go(llama)
    assert replays(llama) > 64


def test_a_graph_that_holds_a_host_value_would_be_found(build: Callable[..., Llama]) -> None:
    """A failure means that the test's graphs compute more than CUDA would."""
    inputs = torch.tensor([[1.0], [2.0]])
    numbers = iter([10.0, 20.0])
    pool = fake_cuda.ReplayedGraph.pool(nn.Module())
    graph = fake_cuda.ReplayedGraph(lambda x: x[0] * 2 + next(numbers), inputs, pool)
    other = fake_cuda.ReplayedGraph(lambda x: x.sum(0), inputs, pool)
    first = graph(inputs + 1)
    assert first.tolist() == [14.0]  # not 24: the first number stays
    other(inputs)
    assert first.isnan().all()  # which wasn't copied in time
    with pytest.raises(AssertionError, match="can't wait"):
        fake_cuda.ReplayedGraph(lambda x: x * x.sum().item(), inputs, pool)


def test_longer_texts_take_longer_graphs(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that short texts pay for the cache's whole length, or long ones are cut."""
    monkeypatch.setattr("llama.engine.graphs._FIRST_LENGTH", 32)
    llama = build(max_batch_size=1, max_seq_len=600)
    steps = llama.engine.decode
    assert steps is not None and steps.lengths == [32, 64, 128, 256, 512, 600]
    prompt = llama.tokenizer.encode(STORY, True, False)
    fake_cuda.varlen_calls.clear()
    long = llama.generate([(prompt * 40)[:505]], 20, temperature=0)[0]
    plain = Llama(llama.model, llama.tokenizer)
    assert long == plain.generate([(prompt * 40)[:505]], 20, temperature=0)[0]
    counts = {key: graph.n_replays for key, graph in steps._graphs.items()}
    assert counts[1, 512] > 3 and counts[1, 600] > 3 and counts[1, 32] == 1  # while building


class TestPassesAhead:
    def test_who_waits_is_admitted_while_others_stream(self, build: Callable[..., Llama]) -> None:
        """A failure means that a request waits for the end of all earlier ones."""
        client = Client(build(max_batch_size=2))
        client.submit("The cow", temperature=0, max_gen_len=60)
        for _ in range(4):
            client.step()
        late = client.submit("One day", temperature=0, max_gen_len=5)
        for _ in range(3):
            client.step()
        assert late.tokens

    def test_answers_are_reused(self, build: Callable[..., Llama]) -> None:
        """A failure means that each turn of a chat reads the last answer again."""
        llama = build(max_batch_size=1)
        prompt = llama.tokenizer.encode(STORY, True, False)
        [answer], _ = llama.generate([prompt], 20, temperature=0)
        before = llama.engine.counts.reused_tokens
        llama.generate([[*prompt, *answer, 300]], 1, temperature=0)
        # The last token's keys and values haven't been computed.
        assert llama.engine.counts.reused_tokens - before >= len(prompt) + len(answer) - 1

    def test_drafts_are_still_made(self, build: Callable[..., Llama]) -> None:
        """A failure means that prompt lookup does nothing on GPUs."""
        llama = build(max_batch_size=1)
        prompt = llama.tokenizer.encode(REPEATED, True, False)
        passes = []
        for n_drafted in (0, 8):
            before = llama.engine.counts.passes
            llama.generate([prompt], 40, temperature=0, prompt_lookup_num_tokens=n_drafted)
            passes.append(llama.engine.counts.passes - before)
        assert passes[1] < 0.8 * passes[0]

    def test_an_interrupt_loses_nothing(
        self, build: Callable[..., Llama], tiny: Llama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure means that a text goes on from a pass which nobody has read."""
        client = Client(build(max_batch_size=1))
        sequence = client.submit(STORY, temperature=0, max_gen_len=30)
        for _ in range(4):
            client.step()
        with monkeypatch.context() as patch:
            patch.setattr(client.engine._runner, "finish", lambda started: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                client.step()
        client.run()
        expected = tiny.text_completion([STORY], 0, max_gen_len=30)[0]["generation"]
        assert client.texts[sequence] == expected

    def test_one_row_that_is_not_finite_is_enough(self, build: Callable[..., Llama]) -> None:
        """A failure means that a sequence is answered with garbage beside a sound one."""
        client = Client(build(max_batch_size=2))
        for text in ("The cow", "One day"):
            client.submit(text, temperature=0, max_gen_len=30)
        for _ in range(3):
            client.step()
        client.llama.model.layers[0].attention.cache.v[1].fill_(torch.nan)
        with pytest.raises(NotFinite):
            client.run()

    def test_redrawing_leaves_neighbours_alone(
        self, build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure means that a text depends on what else is in its batch."""
        monkeypatch.setattr(runner, "_CANDIDATES", 2)
        llama = build(max_batch_size=2)
        engine_runner, asked = llama.engine._runner, []
        sample = runner.sample

        def shifted(logits: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append(rest[3])
            tokens, is_enough = sample(logits, *rest)
            # A second draw among all that differs, as rounding may let it.
            return (tokens if rest[3] else tokens * 0 + 7), is_enough

        monkeypatch.setattr(runner, "sample", shifted)
        prompts, settings = [PROMPTS[1], PROMPTS[3]], {"temperature": 1.0, "top_p": 0.95, "seed": 2}
        found, _ = llama.generate(prompts, 1, **settings)
        monkeypatch.setattr(runner, "sample", sample)
        engine_runner._sorts_all = 0
        expected, _ = llama.generate(
            [PROMPTS[1], PROMPTS[3]], 1, temperature=1.0, top_p=0.95, seed=2
        )
        changed = [ours != theirs for ours, theirs in zip(found, expected, strict=True)]
        assert asked == [2, None] and not all(changed), (asked, changed)

    def test_streams_end_where_they_would(self, build: Callable[..., Llama], tiny: Llama) -> None:
        """A failure means that a token after the end reaches a text, or another one's cache."""
        llama = build(max_batch_size=2)
        prompts = [STORY, "The cow", REPEATED, "One day", STORY + " It"]
        for settings in ({"stop": ["."]}, {"stop": ["e"]}, {}, {"temperature": 1.0, "seed": 3}):
            settings = {"temperature": 0, "max_gen_len": 30, **settings}
            assert llama.text_completion(prompts, **settings) == tiny.text_completion(
                prompts, **settings
            )
            streamed = "".join(llama.text_completion_stream(prompts[0], **settings))
            assert streamed == "".join(tiny.text_completion_stream(prompts[0], **settings))

    def test_results_are_sent_before_the_next_pass_starts_and_read_after(
        self, build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure means that the device waits for stop strings and texts, or they for it."""
        client = Client(build(max_batch_size=2))
        order: list[str] = []
        start, to_host = client.engine._runner.start, runner.to_host

        def sent(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
            order.append("send")
            wait = to_host(tensor)
            return lambda: order.append("read") or wait()

        def started(*arguments: Any) -> runner.Pass:
            order.append("start")
            return start(*arguments)

        monkeypatch.setattr(client.engine._runner, "start", started)
        monkeypatch.setattr(runner, "to_host", sent)
        client.submit("Once upon a time", temperature=0, max_gen_len=5)
        client.run()
        again = ["start", "send", "read"]
        assert order == ["start", "send", *again * 4, "read"]

    def test_cancelled_sequences_leave_no_trace(
        self, build: Callable[..., Llama], tiny: Llama
    ) -> None:
        """A failure means that a slot's next owner gets what was computed for the last one."""
        client = Client(build(max_batch_size=2))
        for i, text in enumerate(["The cow", "One day", STORY, "The cow ran"]):
            gone = client.submit(text, temperature=0, max_gen_len=40)
            kept = client.submit(text + "s", temperature=0, max_gen_len=20)
            for _ in range(3 + i):
                client.step()
            client.engine.cancel(gone)
            later = client.submit(text + " then", temperature=0, max_gen_len=20)
            client.run()
            for sequence, prompt in ((kept, text + "s"), (later, text + " then")):
                expected = tiny.text_completion([prompt], 0, max_gen_len=20)
                assert client.texts[sequence] == expected[0]["generation"]

    def test_a_pass_that_fails_ends_all_and_the_next_ones_are_right(
        self, build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure means that garbage from a damaged pass is continued."""
        client = Client(build(max_batch_size=2))
        before = client.submit("The cow", temperature=0, max_gen_len=12)
        client.run()
        broken = client.submit("The cow", temperature=0, max_gen_len=30)
        for _ in range(3):
            client.step()
        client.llama.model.layers[0].attention.cache.v.fill_(torch.nan)
        with pytest.raises(NotFinite):
            client.run()
        assert broken.finish_reason == "error"
        again = client.submit("The cow", temperature=0, max_gen_len=12)
        client.run()
        assert client.texts[again] == client.texts[before]

    def test_draws_that_need_more_candidates_are_done_again(
        self, build: Callable[..., Llama], tiny: Llama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure means that flat distributions lose their tail, or go on from another token."""
        monkeypatch.setattr(runner, "_CANDIDATES", 2)
        llama = build(max_batch_size=2)
        redrawn: list[bool] = []
        finish = llama.engine._runner.finish

        def watched(started: runner.Pass) -> Any:
            chosen, is_redrawn = finish(started)
            redrawn.append(is_redrawn)
            return chosen, is_redrawn

        monkeypatch.setattr(llama.engine._runner, "finish", watched)
        found = llama.generate(PROMPTS, 30, temperature=1.0, top_p=0.95, seed=1, logprobs=True)
        monkeypatch.undo()
        expected = tiny.generate(PROMPTS, 30, temperature=1.0, top_p=0.95, seed=1, logprobs=True)
        assert found[0] == expected[0]
        assert True in redrawn and False in redrawn


RANKS = """
import json, os, sys, torch
import fake_cuda
from llama import Llama, parallel
fake_cuda.pretend(setattr)
parallel.can_capture = lambda: True
from llama.engine import runner
runner._CANDIDATES = 2  # so that draws are done again
sample = runner.sample
def other(*arguments):
    tokens, is_enough = sample(*arguments)
    return 0 * tokens, is_enough
if os.environ["RANK"] == "1":  # whose own draws must not matter, the first and the second ones
    runner.sample = other
llama = Llama.build(device="cpu", dtype=torch.float32, max_batch_size=3)
settings = {"logprobs": True, "prompt_lookup_num_tokens": 5}
found = [
    llama.generate(json.loads(sys.argv[2]), 64, temperature, seed=3, **settings)[0]
    for temperature in (0, 0.8)
]
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump([found, fake_cuda.n_replays(llama.engine.decode)], file)
"""


@pytest.mark.slow
def test_two_ranks_replay_the_same_steps(tiny: Llama, tmp_path: Path) -> None:
    """A failure means that a collective can't be recorded, or ranks go different ways."""
    out = tmp_path / "rank"
    arguments = (script(tmp_path, RANKS), str(out), json.dumps(PROMPTS))
    tests = str(Path(__file__).parents[1])
    done = forked(*arguments, path=tests, n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [tiny.generate(PROMPTS, 64, temperature, seed=3)[0] for temperature in (0, 0.8)]
    for rank in range(2):
        found, n_replays = json.loads(Path(f"{out}{rank}").read_text())
        assert found == expected and n_replays > 64


def test_a_model_that_cannot_be_recorded_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that ranks over gloo, on GPUs, die while building."""
    fake_cuda.pretend(monkeypatch.setattr)
    monkeypatch.setattr("llama.parallel.can_capture", lambda: False)
    llama = Llama.build(dtype=torch.float32, device="cpu")
    assert llama.engine.decode is None
    assert isinstance(llama.model.backend, Varlen)


def test_steps_that_cannot_be_recorded_are_told_and_computed_anyway(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that a GPU without room for graphs can't be used, or is slow in silence."""
    fake_cuda.pretend(monkeypatch.setattr)

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no room for graphs")

    monkeypatch.setattr(fake_cuda.ReplayedGraph, "__init__", full)
    with caplog.at_level("WARNING", "llama.engine.graphs"):
        llama = Llama.build(dtype=torch.float32, device="cpu")
    assert llama.engine.decode is None and "no room for graphs" in caplog.text
    assert llama.generate(PROMPTS, 9, temperature=0) == tiny.generate(PROMPTS, 9, temperature=0)
