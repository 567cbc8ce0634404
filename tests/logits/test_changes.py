"""Penalties, biases, bans and processors: the formulas, and texts that depend on nothing else."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from engine_client import Client
from hf_files import make_hf, save_hf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama import Llama
from llama.engine import runner
from llama.engine.sequence import Sequence
from llama.layers.batch import to_device
from llama.logits.changes import LogitChanges
from llama.sampling import SamplingParams, keep

CPU = torch.device("cpu")
N_WORDS = 40
REPEATED = "Tom has a red ball. Tom has a red ball. Tom has a"
PROMPTS = [REPEATED, "The cow", "One day", "Once upon a time", REPEATED + " red", "def add("]
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
}


def changed(
    logits: torch.Tensor,
    sequences: list[Sequence],
    drafts: list[list[int]] | None = None,
    changes: LogitChanges | None = None,
) -> torch.Tensor:
    """The logits of a step after the texts of sequences, and after each token of their drafts."""
    parts, n_drawn = [], 0
    for slot, sequence in enumerate(sequences):
        draft = drafts[slot] if drafts else []
        text = [*sequence.prompt, *sequence.tokens]
        n = len(draft) + 1
        parts.append(runner.Piece(sequence, slot, len(text) - 1, [text[-1], *draft], n, n))
        n_drawn += n
    change = (changes or LogitChanges(len(sequences), 64, logits.shape[1])).of(parts, False)
    tokens = [token for part in parts for token in part.tokens]
    tokens, *numbers = to_device(CPU, [tokens, *change.whole], change.floats)
    before = logits.clone()
    found = change.apply(logits, tokens, numbers)
    assert torch.equal(logits, before) and found.shape == (n_drawn, logits.shape[1])
    return found


def make(prompt: list[int], tokens: list[int], **how: Any) -> Sequence:
    return Sequence(prompt, SamplingParams(**how), tokens=tokens)


IDS = st.lists(st.integers(0, N_WORDS - 1), max_size=12)
PROMPT = st.lists(st.integers(0, N_WORDS - 1), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**31)


def random_logits(seed: int, n: int = 1) -> torch.Tensor:
    return torch.randn(n, N_WORDS, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=300, deadline=None)
@given(
    SEEDS,
    PROMPT,
    IDS,
    st.sampled_from([1.0, 0.7, 1.3, 3.0]),
    st.floats(0.1, 3),
    st.one_of(st.just(0), st.integers(1, N_WORDS)),
    st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    st.one_of(st.just(0.0), st.floats(0.001, 1)),
    st.one_of(st.none(), st.integers(1, N_WORDS)),
)
def test_what_is_drawn_from_is_what_transformers_would(
    seed: int,
    prompt: list[int],
    answer: list[int],
    penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    n_candidates: int | None,
) -> None:
    """A failure means that a sampler keeps other tokens, or gives them other probabilities."""
    logits = random_logits(seed)
    expected, ids = logits, torch.tensor([[*prompt, *answer]])
    warpers = [
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
        *([MinPLogitsWarper(min_p)] if min_p else []),
    ]
    for warper in warpers:
        before = expected.softmax(-1)
        if isinstance(warper, TopKLogitsWarper):
            assume((before > 0).all())  # where they don't tie as too small for a number
        if isinstance(warper, TopPLogitsWarper):
            reached = before.sort(descending=True).values.cumsum(-1)
            assume(((reached - top_p).abs() > 1e-6).all())
        if isinstance(warper, MinPLogitsWarper):
            assume(((before / before.max() - min_p).abs() > 1e-6).all())
        expected = warper(ids, expected)

    found = changed(logits, [make(prompt, answer, repetition_penalty=penalty)])
    limits = torch.tensor([float(top_k)]), torch.tensor([min_p])
    n_candidates = None if n_candidates is None else max(n_candidates, top_k)
    kept = keep((found / temperature).softmax(-1), torch.tensor([top_p]), n_candidates, *limits)
    probs, size = expected.softmax(-1), int(kept.size)
    expected_ids = set(expected[0].isfinite().nonzero().flatten().tolist())
    if not kept.is_whole:  # the rest may be among the tokens that weren't sorted
        assert n_candidates == size <= len(expected_ids)
        return
    assert set(kept.ids[0, :size].tolist()) == expected_ids
    drawn_from = torch.zeros_like(probs)
    drawn_from[0, kept.ids[0, :size]] = kept.probs[0, :size] / kept.mass[0]
    torch.testing.assert_close(drawn_from, probs, atol=1e-6, rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(SEEDS, PROMPT, IDS, st.floats(-2, 2), st.floats(-2, 2), IDS)
def test_presence_and_frequency_count_the_answer(
    seed: int,
    prompt: list[int],
    answer: list[int],
    presence: float,
    frequency: float,
    draft: list[int],
) -> None:
    """A failure means another formula than OpenAI's, or that the prompt counts too."""
    logits = random_logits(seed, 1 + len(draft))
    sequence = make(prompt, answer, presence_penalty=presence, frequency_penalty=frequency)
    found = changed(logits, [sequence], [draft])
    for row in range(1 + len(draft)):
        text = [*answer, *draft[:row]]
        for token in range(N_WORDS):
            count = text.count(token)
            expected = logits[row, token] - count * frequency - (count > 0) * presence
            assert math.isclose(found[row, token], expected, abs_tol=1e-5), (row, token)


def test_each_row_gets_its_own_changes() -> None:
    """A failure means that penalties, biases or bans reach another sequence, or add up wrongly."""
    logits = random_logits(3, 5)
    sequences = [
        make([1, 2], [3], logit_bias={5: 2.5, 6: -100, 7: -1e9, 8: 1e30}),
        make([1, 2], [3, 3]),
        make([4], [5], min_tokens=2, stop_token_ids=[9, 10, 500]),
        make([4], [5, 6], min_tokens=2, stop_token_ids=[9, 10], repetition_penalty=2.0),
        make([7], [], presence_penalty=1.0),
    ]
    found = changed(logits, sequences)
    expected = logits.clone()
    expected[0, 5] += 2.5
    expected[0, 8] += 1e9
    for token in (4, 5, 6):
        expected[3, token] *= 2 if expected[3, token] < 0 else 0.5
    banned = [(0, 6), (0, 7), (2, 9), (2, 10)]
    for row, token in banned:
        assert found[row, token] < -1e29
        found[row, token] = expected[row, token]
    torch.testing.assert_close(found, expected)


def test_a_slot_s_next_text_replaces_the_last_one() -> None:
    """A failure means that a text whose beginning was in the cache has another one's penalties."""
    logits, changes = random_logits(5), LogitChanges(1, 64, N_WORDS)
    for text in ([1, 2, 3, 4], [5, 6, 7], [1, 2, 8, 8, 8, 8]):
        sequence = make(text[:2], text[2:], **PENALTIES)
        found = changed(logits, [sequence], changes=changes)
        assert torch.equal(found, changed(logits, [sequence]))
        assert set((found != logits)[0].nonzero().flatten().tolist()) == set(text)


def test_ids_beyond_the_vocabulary_have_no_logits() -> None:
    """A failure means that a prompt of padded ids changes a neighbour's logits, or fails."""
    logits = random_logits(4, 2)
    found = changed(logits, [make([N_WORDS + 1, 3], [], **PENALTIES), make([1], [])])
    expected = logits[0, 3] * 1.2 if logits[0, 3] < 0 else logits[0, 3] / 1.2
    torch.testing.assert_close(found[0, 3], expected)
    found[0, 3] = logits[0, 3]
    assert torch.equal(found, logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_greedy_ids_with_a_penalty_are_those_of_transformers(
    temperature: float, tmp_path: Path
) -> None:
    """A failure means that penalties grow apart from the text, token by token."""
    reference = save_hf(make_hf(), tmp_path)
    reference.generation_config.eos_token_id = None
    llama = Llama.build(
        tmp_path, max_seq_len=128, max_batch_size=2, dtype=torch.float32, device="cpu"
    )
    llama.tokenizer.stop_ids = frozenset()
    prompts = [[1, 20, 300], [1, *range(40, 80)], [1], [1, *range(500, 517)]]
    # With top_k=1 draws take the most probable token too.
    how = {"temperature": temperature, "top_k": int(temperature)}
    found, _ = llama.generate(prompts, 64, **how, repetition_penalty=1.3)
    plain, _ = llama.generate(prompts, 64, **how)
    assert found != plain
    for prompt, ids in zip(prompts, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=64,
            repetition_penalty=1.3,
            pad_token_id=0,
        )
        assert ids == expected[0, len(prompt) :].tolist()


def test_frequencies_pass_a_chi_square_test(tiny: Llama) -> None:
    """A failure means that tokens are drawn with other probabilities than they have."""
    tokenizer = tiny.tokenizer
    ids = tokenizer.encode("Tom has a", True, False)
    biases = {tokenizer.encode(" red", False, False)[-1]: -100, 300: 2.0}
    how: dict[str, Any] = {"temperature": 1.1, "top_k": 60, "top_p": 0.97, "min_p": 0.004}
    n = 4000
    found, _ = tiny.generate([ids], 1, **how, n=n, seed=7, logit_bias=biases)
    logits = tiny.model(torch.tensor([ids]))[0, -1:].clone()
    for token, bias in biases.items():
        logits[0, token] += -math.inf if bias == -100 else bias
    for warper in (
        TemperatureLogitsWarper(how["temperature"]),
        TopKLogitsWarper(how["top_k"]),
        TopPLogitsWarper(how["top_p"]),
        MinPLogitsWarper(how["min_p"]),
    ):
        logits = warper(torch.tensor([ids]), logits)
    expected = logits.softmax(-1)[0] * n
    stops = sum(not each for each in found)
    counts = torch.tensor([each[0] for each in found if each]).bincount(minlength=len(expected))
    counts[tokenizer.eos_id] += stops
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    groups = [(counts[often], expected[often]), (counts[~often].sum(), expected[~often].sum())]
    chi_square = sum(float(((c - e) ** 2 / e.clamp(min=1)).sum()) for c, e in groups)
    degrees = int(often.sum())
    assert degrees > 15
    # 99.9 % of such sums lie below (Wilson and Hilferty's approximation).
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square < limit


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0, **PENALTIES},
    {"temperature": 0.9, "seed": 3, **PENALTIES, "top_k": 30},
    {"temperature": 1.0, "seed": 4, "top_p": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.7, "logit_bias": {300: 1, 301: -100}},
    {"temperature": 0, "min_tokens": 25, "presence_penalty": -0.5},
    {"temperature": 0.8, "seed": 6},
]


@pytest.mark.slow
def test_a_text_does_not_depend_on_its_batch(tiny: Llama) -> None:
    """A failure means that samplers of one request reach another one's, or a slot's old text."""
    rng = random.Random(3)
    client, submitted = Client(tiny), []
    for i in range(18):
        prompt, how = PROMPTS[i % len(PROMPTS)], SETTINGS[i % 5 if i < 10 else rng.randrange(6)]
        how = {**how, "max_gen_len": rng.choice([10, 30, 45])}
        how["prompt_lookup_num_tokens"] = rng.choice([0, 5])
        submitted.append((client.submit(prompt, **how), prompt, how))
        for _ in range(rng.randrange(5)):
            client.step()
    client.run()
    for sequence, prompt, how in submitted:
        alone = Client(tiny)
        expected = alone.submit(prompt, **how)
        alone.run()
        assert sequence.tokens == expected.tokens, (prompt, how)


@pytest.mark.parametrize("how", SETTINGS[:5])
def test_drafts_change_nothing(tiny: Llama, how: dict[str, Any]) -> None:
    """A failure means that a draft's tokens are penalised before they are accepted, or stay so."""
    found = []
    for n_drafted in (0, 8):
        client = Client(tiny)
        more = {"max_gen_len": 60, "prompt_lookup_num_tokens": n_drafted}
        sequence = client.submit(REPEATED, **{**how, **more, "repetition_penalty": 1.02})
        client.run()
        found.append((sequence.tokens, client.engine.counts.passes))
    assert found[0][0] == found[1][0]


@pytest.mark.parametrize("n_candidates", [1024, 2])
@pytest.mark.parametrize("how", SETTINGS)
def test_passes_ahead_of_the_host_change_nothing(
    n_candidates: int, how: dict[str, Any], tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that CUDA's penalties miss the last token, or keep one that was redrawn."""
    with monkeypatch.context() as patch:
        fake_cuda.pretend(patch.setattr)
        llama = Llama.build(dtype=torch.float32, device="cpu", max_batch_size=2)
    assert llama.engine.runs_ahead
    ahead = []
    start = llama.engine._runner.start

    def watched(pieces: Any, decode: Any, drawn: Any = None) -> runner.Pass:
        ahead.append(drawn is not None)
        return start(pieces, decode, drawn)

    monkeypatch.setattr(llama.engine._runner, "start", watched)
    monkeypatch.setattr(runner, "_CANDIDATES", n_candidates)
    ids = [llama.tokenizer.encode(prompt, True, False) for prompt in PROMPTS[:4]]
    found, _ = llama.generate(ids, 20, **how)
    monkeypatch.setattr(runner, "_CANDIDATES", 1024)
    assert found == tiny.generate(ids, 20, **how)[0]
    assert sum(ahead) > 20 and not all(ahead)


def test_who_asks_for_nothing_pays_nothing(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that every text pays for samplers that few ask for."""
    passes = []
    start = runner.Runner.start

    def watched(self: runner.Runner, *arguments: Any) -> runner.Pass:
        passes.append(start(self, *arguments))
        return passes[-1]

    monkeypatch.setattr(runner.Runner, "start", watched)
    client = Client(tiny)
    client.submit("The cow", temperature=0.7, max_gen_len=5, min_tokens=2)
    client.submit("One day", max_gen_len=5)
    client.run()
    asked = [each.changed.data_ptr() != each.logits.data_ptr() for each in passes]
    assert asked == [True, True, False, False, False]  # a copy while the end is banned
    assert all(len(each.sampling) == 3 for each in passes)  # no top-k, no min-p
    assert client.engine._runner._changes._penalties is None


class TestProcessors:
    def test_they_are_called_as_transformers_does(self, tiny: Llama) -> None:
        """A failure means that processors of transformers get ids or logits of another form."""
        asked: list[list[int]] = []

        def process(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            assert ids.dtype == torch.int64 and logits.dtype == torch.float32
            assert ids.shape == (1, len(ids[0]))
            assert logits.shape == (1, tiny.tokenizer.n_words)
            asked.append(ids[0].tolist())
            return logits.index_fill(1, torch.tensor([300 + len(ids[0]) % 7]), 1e4)

        prompt = tiny.tokenizer.encode("The cow", True, False)
        [found], _ = tiny.generate([prompt], 5, temperature=0, logits_processor=process)
        assert found == [300 + (len(prompt) + i) % 7 for i in range(5)]
        assert asked == [[*prompt, *found[:i]] for i in range(5)]

    @pytest.mark.parametrize("n_drafted", [0, 6])
    def test_a_penalty_of_transformers_gives_our_texts(self, tiny: Llama, n_drafted: int) -> None:
        """A failure means that a processor sees another text than the one before its draw."""
        ids = [tiny.tokenizer.encode(prompt, True, False) for prompt in PROMPTS]
        for how in ({"temperature": 0}, {"seed": 3}):
            expected, _ = tiny.generate(ids, 24, **how, repetition_penalty=1.2)
            process = RepetitionPenaltyLogitsProcessor(1.2)
            more: dict[str, Any] = {"prompt_lookup_num_tokens": n_drafted, **how}
            assert tiny.generate(ids, 24, **more, logits_processor=process)[0] == expected

    def test_the_model_s_own_scores_are_returned(self, tiny: Llama) -> None:
        """A failure means that log-probabilities are those of changed logits."""
        client = Client(tiny)
        how: dict[str, Any] = {"logit_bias": {300: 50}, "logprobs": True, "top_logprobs": 3}
        sequence = client.submit("The cow", temperature=1.0, top_k=1, max_gen_len=1, **how)
        client.run()
        scores = tiny.model(torch.tensor([sequence.prompt]))[0, -1].log_softmax(-1)
        assert sequence.tokens == [300]
        assert sequence.logprobs == pytest.approx([float(scores[300])], abs=1e-4)
        assert [token for token, _ in sequence.top_logprobs[0]] == scores.topk(3).indices.tolist()

    @pytest.mark.parametrize(
        ("how", "same"),
        [({"top_k": 10**400}, {}), ({"logit_bias": {300: 10**400}}, {"logit_bias": {300: 1e9}})],
    )
    def test_numbers_of_any_size(
        self, tiny: Llama, how: dict[str, Any], same: dict[str, Any]
    ) -> None:
        """A failure means that one request's number ends the pass of all others."""
        expected = tiny.generate([[1, 300]], 4, seed=1, **same)
        assert tiny.generate([[1, 300]], 4, seed=1, **how) == expected

    @pytest.mark.parametrize(
        ("process", "message"),
        [
            (lambda ids, logits: logits[0], r"returned \(768,\): expected logits of .* \(1, 768\)"),
            (lambda ids, logits: None, "returned <class 'NoneType'>"),
            (lambda ids, logits: logits * math.nan, "whose largest is nan"),
            (lambda ids, logits: logits - math.inf, "whose largest is -inf: .* leave one at least"),
            (lambda ids, logits: logits + math.inf, "whose largest is inf"),
        ],
    )
    def test_mistakes_are_named(
        self, tiny: Llama, process: Callable[..., Any], message: str
    ) -> None:
        """A failure means that a text is drawn from garbage, or an error names our inside."""
        expected = tiny.text_completion(["The cow"], 0, max_gen_len=4)
        with pytest.raises(ValueError, match=message):
            tiny.text_completion(["The cow"], 0, max_gen_len=4, logits_processor=process)
        assert tiny.text_completion(["The cow"], 0, max_gen_len=4) == expected


def test_bans_and_least_lengths_are_kept(tiny: Llama) -> None:
    """A failure means that a banned token is drawn, or an answer ends too soon."""
    tokenizer = tiny.tokenizer
    ids = [tokenizer.encode(prompt, True, False) for prompt in PROMPTS]
    plain, _ = tiny.generate(ids, 20, temperature=1.0, seed=2)
    often = {token: -100 for text in plain for token in text}
    found, _ = tiny.generate(ids, 20, temperature=1.0, seed=2, logit_bias=often)
    assert all(found) and not {token for text in found for token in text} & often.keys()
    ends = {tokenizer.eos_id: 100.0}  # the end is the most probable token by far
    assert not any(tiny.generate(ids, 20, temperature=1.0, logit_bias=ends)[0])
    found, _ = tiny.generate(ids, 20, temperature=1.0, logit_bias=ends, min_tokens=7)
    assert [len(text) for text in found] == [7] * len(ids)


def test_draws_among_all_keep_to_the_bans(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that draws which need more candidates are made from the model's logits."""
    monkeypatch.setattr(runner, "_CANDIDATES", 2)
    monkeypatch.setattr(runner, "_AFTER_REDRAWING", 0)
    monkeypatch.setattr(tiny.engine._runner, "_sorts_all", 0)
    redrawn, finish = [], tiny.engine._runner.finish

    def watched(started: runner.Pass) -> Any:
        redrawn.append(finish(started))
        return redrawn[-1]

    monkeypatch.setattr(tiny.engine._runner, "finish", watched)
    bans = dict.fromkeys(range(0, 768, 2), -100)
    found, _ = tiny.generate([[5, 6]], 4, temperature=1.5, n=16, seed=1, logit_bias=bans)
    assert all(token % 2 for text in found for token in text)
    assert sum(is_redrawn for _, is_redrawn in redrawn) > 3


def test_ids_that_no_bias_can_have_are_named(tiny: Llama) -> None:
    """A failure means that another row's logits are changed, or an index fails in a pass."""
    for token in (-1, 768):
        with pytest.raises(ValueError, match=f"logit_bias names the token id {token}, outside"):
            tiny.text_completion(["The cow"], logit_bias={token: 1})
