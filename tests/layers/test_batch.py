"""Ragged batches: which token is where, and which attention call serves it."""

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import CausalBias

from llama.layers.attention import _CPU_SPAN, Sdpa, Span
from llama.layers.batch import Segment

CPU = torch.device("cpu")
F32 = torch.float32
SHORT = st.integers(1, 3)
SEGMENTS = st.lists(
    st.tuples(st.integers(0, 30), st.just(1) | SHORT | st.integers(60, 140)) | st.none(),
    min_size=1,
    max_size=6,
).filter(any)  # for each slot its first position and length, or nothing


def spans_of(segments: list[Segment], kind: str = "cpu") -> list[Span]:
    return list(Sdpa(kind, F32).layout(segments, CPU).calls)


def ends(spans: list[Span]) -> list[tuple[slice, slice, int]]:
    return [(span.tokens, span.slots, span.kv_len) for span in spans]


def test_the_documented_example() -> None:
    """A failure means that the explanation of the layout is wrong."""
    batch = Sdpa("cpu", F32).layout([Segment(0, 0, 3), Segment(3, 7, 1)], CPU)
    assert batch.slots.tolist() == [0, 0, 0, 3]
    assert batch.positions.tolist() == [0, 1, 2, 7]
    assert ends(batch.calls) == [
        (slice(0, 3), slice(0, 1), 3),
        (slice(3, 4), slice(3, 4), 8),
    ]


@settings(deadline=None)
@given(SEGMENTS, st.sampled_from(["cpu", "cuda", "mps"]))
def test_spans_serve_each_token_once_with_its_own_past(
    slots: list[tuple[int, int] | None], kind: str
) -> None:
    """A failure means that a token has no attention, or sees what it may not."""
    segments = [Segment(i, *pair) for i, pair in enumerate(slots) if pair]
    batch = Sdpa(kind, F32).layout(segments, CPU)
    served: list[int] = []
    for span in batch.calls:
        tokens = range(len(batch.slots))[span.tokens]
        served += tokens
        n_slots = span.slots.stop - span.slots.start
        assert n_slots in (1, len(tokens))
        causal = torch.ones(len(tokens), span.kv_len, dtype=torch.bool)
        if n_slots == 1 and len(tokens) > 1:
            causal = causal.tril()
        mask = causal
        if isinstance(span.mask, CausalBias):
            mask = span.mask._materialize(CPU)
        elif span.mask is not None:
            mask = (span.mask == 0).reshape(len(tokens), span.kv_len)
        for i, token in enumerate(tokens):
            slot = span.slots.start + (i if n_slots > 1 else 0)
            assert slot == batch.slots[token]
            assert mask[i].nonzero()[:, 0].tolist() == list(range(int(batch.positions[token]) + 1))
    assert served == list(range(len(batch.slots)))


@pytest.mark.parametrize(
    ("segments", "slots"),
    [
        ([(0, 5, 1), (1, 9, 1), (2, 0, 1)], [(0, 3)]),
        ([(0, 5, 1), (2, 9, 1), (3, 0, 1)], [(0, 1), (2, 4)]),
        ([(0, 5, 1), (1, 0, 2), (2, 9, 1), (3, 0, 1)], [(0, 1), (1, 2), (2, 4)]),
    ],
)
def test_neighbours_are_decoded_in_one_call(
    segments: list[tuple[int, int, int]], slots: list[tuple[int, int]]
) -> None:
    """A failure means as many attention calls as there are sequences."""
    spans = spans_of([Segment(*segment) for segment in segments])
    assert [(span.slots.start, span.slots.stop) for span in spans] == slots


def test_no_mask_where_none_is_needed() -> None:
    """A failure means that the fast kernels, which take no mask, aren't used."""
    alike = spans_of([Segment(0, 8, 1), Segment(1, 8, 1)])
    assert [span.mask for span in alike] == [None]
    first, second = spans_of([Segment(0, 0, _CPU_SPAN + 1), Segment(1, 1, 2)])[::2]
    assert first.mask is None and second.mask is not None


def test_prompts_are_cut_on_a_cpu_alone() -> None:
    """A failure means quadratic work on CPUs, or many small calls on a GPU."""
    segments = [Segment(0, 0, 300)]
    assert len(spans_of(segments)) == -(-300 // _CPU_SPAN) > 2
    assert ends(spans_of(segments, "cuda")) == [(slice(0, 300), slice(0, 1), 300)]


@pytest.mark.parametrize(
    ("segments", "n_tokens", "message"),
    [
        ([], 0, "segments"),
        ([Segment(0, 0, 3)], 4, "segments of 3"),
        ([Segment(4, 0, 1)], 1, "max_batch_size of 4"),
        ([Segment(1, 0, 1), Segment(1, 1, 1)], 2, "once at most"),
        ([Segment(0, 127, 2)], 2, "max_seq_len of 128"),
        ([Segment(0, -1, 2)], 2, "max_seq_len of 128"),
    ],
)
def test_tokens_that_do_not_fit_the_cache_are_refused(
    segments: list[Segment], n_tokens: int, message: str
) -> None:
    """A failure means that a caller's mistake writes to another sequence's cache."""
    with pytest.raises(ValueError, match=message):
        make_model().forward_ragged(torch.zeros(n_tokens, dtype=torch.long), segments)
