"""Sampling: greedy, nucleus, and draws that depend on the row's own number alone."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.sampling import SamplingParams, sample, sample_top_p, token_logprobs

ROWS = st.integers(0, 2**31).map(
    lambda seed: torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * 3
)
UNIT = st.floats(0, 1, exclude_max=True, width=32)


def next_tokens(
    logits: torch.Tensor, temperature: float, top_p: float, uniforms: torch.Tensor
) -> torch.Tensor:
    """The draws of rows with the same parameters, among all tokens."""
    same = (torch.full_like(uniforms, value) for value in (temperature, top_p))
    tokens, is_enough = sample(logits, *same, uniforms)
    assert is_enough.all()
    return tokens


@settings(max_examples=100, deadline=None)
@given(ROWS, st.floats(0, 1), UNIT, st.floats(1e-5, 10))
def test_draws_stay_in_the_nucleus(
    logits: torch.Tensor, top_p: float, u: float, temperature: float
) -> None:
    tokens = next_tokens(logits, temperature, top_p, torch.full((5,), u))
    probs = (logits.double() / temperature).softmax(-1)
    for row, token in zip(probs, tokens, strict=True):
        likelier = row[row > row[token] + 1e-6].sum()
        assert likelier <= top_p + 1e-5


@settings(max_examples=50, deadline=None)
@given(ROWS, st.floats(0.1, 1), st.lists(UNIT, min_size=5, max_size=5))
def test_a_row_draws_the_same_in_any_company(
    logits: torch.Tensor, top_p: float, uniforms: list[float]
) -> None:
    u = torch.tensor(uniforms)
    together = next_tokens(logits, 0.8, top_p, u)
    alone = [next_tokens(logits[i : i + 1], 0.8, top_p, u[i : i + 1]) for i in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_frequencies_follow_the_probabilities() -> None:
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    uniforms = (torch.arange(10_000) + 0.5) / 10_000  # every quantile once

    def frequencies(top_p: float) -> list[float]:
        tokens = sample_top_p(probs.expand(10_000, 4), top_p, uniforms)
        return (tokens.bincount(minlength=4) / 10_000).tolist()

    assert frequencies(1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=2e-4)
    # 0.4 and 0.3 are needed to reach 0.5; drawn in their own proportion.
    assert frequencies(0.5) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-4)
    assert frequencies(0.0) == [0, 1, 0, 0]


def test_temperature_zero_and_tiny_ones_are_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9], [1e30, -1e30, 0.0]])
    for temperature in (0.0, 1e-30, 1e-5):
        assert next_tokens(logits, temperature, 1.0, torch.tensor([0.999, 0.999])).tolist() == [
            1,
            0,
        ]


def test_the_largest_draw_stays_in_the_vocabulary() -> None:
    flat = torch.full((1, 32_000), 1 / 32_000)
    assert 0 <= sample_top_p(flat, 1.0, torch.tensor([1.0])).item() < 32_000
    sure = torch.tensor([[1.0, 0.0, 0.0]])
    assert sample_top_p(sure, 1.0, torch.tensor([1 - 2**-26])).item() == 0


def test_logprobs_are_those_of_the_untempered_softmax() -> None:
    logits = torch.randn(6, 50)
    tokens = torch.randint(0, 50, (6,))
    expected = logits.double().softmax(-1)[torch.arange(6), tokens].log()
    torch.testing.assert_close(token_logprobs(logits, tokens).double(), expected)


PARAMS = st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.5, 1.0]), UNIT)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.lists(PARAMS, min_size=5, max_size=5))
def test_rows_of_several_parameters_draw_what_each_draws_alone(
    logits: torch.Tensor, params: list[tuple[float, float, float]]
) -> None:
    """A failure means that a request's settings reach its neighbour in the batch."""
    each = torch.tensor(params).T
    together, _ = sample(logits, *each)
    assert (together.dtype, together.shape) == (torch.long, (5,))
    alone = [sample(logits[i : i + 1], *each[:, i : i + 1])[0] for i in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()
    greedy = [i for i, (temperature, _, _) in enumerate(params) if temperature == 0]
    assert together[greedy].tolist() == logits[greedy].argmax(-1).tolist()


@settings(max_examples=200, deadline=None)
@given(ROWS, st.lists(PARAMS, min_size=5, max_size=5), st.integers(1, 39))
def test_enough_candidates_draw_what_all_draw_and_too_few_are_told(
    logits: torch.Tensor, params: list[tuple[float, float, float]], n_candidates: int
) -> None:
    """A failure means that the tail of a distribution is cut off, or other tokens are drawn."""
    each = torch.tensor(params).T
    expected, _ = sample(logits, *each)
    found, is_enough = sample(logits, *each, n_candidates)
    probs = (logits / torch.where(each[0] == 0, 1, each[0])[:, None]).softmax(-1)
    for i, (temperature, top_p, u) in enumerate(params):
        kept, order = probs[i].sort(descending=True)
        reached = kept.cumsum(0)
        if is_enough[i]:
            rounded = top_p == 1 and (reached - u).abs().min() < 1e-5  # at the edge of two tokens
            assert rounded or found[i] == expected[i]
        else:
            last = n_candidates - 1
            assert temperature > 0 and reached[last] - kept[last] < top_p + 1e-5
            assert (
                top_p < 1
                or order[:n_candidates].tolist().count(expected[i]) == 0
                or ((reached - u).abs().min() < 1e-5)
            )


class TestParams:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"temperature": -0.1}, ValueError, r"temperature is -0.1: expected 0 \(greedy\)"),
            ({"temperature": math.inf}, ValueError, "temperature is inf"),
            ({"temperature": math.nan}, ValueError, "temperature is nan"),
            ({"temperature": "1"}, TypeError, "temperature is '1': give a number"),
            ({"top_p": 1.1}, ValueError, "top_p is 1.1: expected a probability mass from 0 to 1"),
            ({"top_p": math.nan}, ValueError, "top_p is nan"),
            ({"top_p": None}, TypeError, "top_p is None: give a number"),
            ({"max_gen_len": -1}, ValueError, "max_gen_len is -1: expected a whole number"),
            ({"max_gen_len": 2.0}, ValueError, "max_gen_len is 2.0: expected a whole number"),
            ({"prompt_lookup_num_tokens": -1}, ValueError, "prompt_lookup_num_tokens is -1"),
            ({"prompt_lookup_num_tokens": None}, ValueError, "prompt_lookup_num_tokens is None"),
            ({"seed": 1.5}, TypeError, "seed is 1.5: give a whole number"),
            ({"stop": "."}, TypeError, "stop is one str: give a list"),
            ({"stop": [""]}, ValueError, "expected strings that are not empty"),
            ({"stop": [3]}, ValueError, "expected strings that are not empty"),
            ({"stop_token_ids": ["</s>"]}, TypeError, "stop token ids are .*: give token ids"),
        ],
    )
    def test_mistakes_are_named(
        self, settings: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        """A failure means that a mistake changes a text, or is told deep inside a pass."""
        with pytest.raises(error, match=message):
            SamplingParams(**settings)

    def test_what_may_be_read_once_is_kept(self) -> None:
        """A failure means that only the first sequence of a call stops."""
        params = SamplingParams(stop=(s for s in ["."]), stop_token_ids=iter([3, 3, 4]))
        for _ in range(2):
            assert (list(params.stop), set(params.stop_token_ids)) == (["."], {3, 4})

    def test_parameters_cannot_be_changed(self) -> None:
        """A failure means that one sequence can change the parameters of others."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            SamplingParams().temperature = 1  # type: ignore[misc]

    @pytest.mark.parametrize(("logprobs", "echo"), [(True, True), (True, False), (False, True)])
    def test_prompts_are_scored_where_both_are_asked_for(self, logprobs: bool, echo: bool) -> None:
        """A failure means that prompts aren't reused from the cache, or have no scores."""
        params = SamplingParams(logprobs=logprobs, echo=echo)
        assert params.scores_prompt == (logprobs and echo)
