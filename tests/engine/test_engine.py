"""The engine: whatever runs beside it, a sequence gets what it gets alone."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import make_model, passed_tokens
from engine_client import PROMPTS, Client, check_sequences_come_and_go

from llama import Llama, Tokenizer
from llama.engine.engine import Engine
from llama.engine.sequence import Sequence
from llama.errors import NotFinite
from llama.layers.attention import Span


@pytest.fixture
def llama() -> Iterator[Llama]:
    yield Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=4)


@pytest.fixture
def client(llama: Llama) -> Client:
    return Client(llama)


@pytest.mark.slow
def test_a_sequence_gets_what_it_gets_alone(llama: Llama, client: Client) -> None:
    """Sequences of all kinds come at odd times; each one's tokens are those of its own call."""
    rng = random.Random(5)
    sequences: list[tuple[Sequence, str, dict[str, Any]]] = []
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
        sequences.append((client.submit(prompt, **settings), prompt, settings))
        for _ in range(rng.randrange(6)):
            client.step()
    client.run()
    fresh = Llama(llama.model, llama.tokenizer, chat=llama.chat)
    for sequence, prompt, settings in sequences:
        alone = fresh.text_completion([prompt], **settings)[0]
        assert client.texts[sequence] == alone["generation"], (prompt, settings)
        assert sequence.finish_reason in ("stop", "length")
        if settings["logprobs"]:
            assert [llama.tokenizer.token_piece(t) for t in sequence.tokens] == alone["tokens"]
            assert sequence.logprobs == pytest.approx(alone["logprobs"], abs=1e-4)


def test_a_newcomer_is_read_beside_the_others(client: Client) -> None:
    """A long prompt is read in pieces, and each pass gives the others their next token."""
    streams = [client.submit(prompt, temperature=0, seed=1) for prompt in PROMPTS[:3]]
    while any(sequence.is_prefilling for sequence in streams):
        client.step()
    long = client.submit("The sun was warm. " * 30, temperature=0)
    while long.is_prefilling:
        before = [len(sequence.tokens) for sequence in streams]
        read = long.n_cached
        client.step()
        assert long.n_cached - max(read, long.n_reused) <= 64, (
            "a stream waits for more than a piece of a prompt"
        )
        assert [len(sequence.tokens) for sequence in streams] == [n + 1 for n in before], (
            "a stream stood still while a prompt was read"
        )


def test_first_come_first_served(client: Client) -> None:
    """More sequences than slots: each takes the slot that is free first, in order."""
    sequences = [client.submit(f"{i} ducks", temperature=0, max_gen_len=5 + i) for i in range(9)]
    admitted: list[Sequence] = []
    while client.engine.n_running or client.engine.n_waiting:
        client.step()
        admitted += [
            sequence
            for sequence in sequences
            if sequence.slot is not None and sequence not in admitted
        ]
        assert client.engine.n_running <= 4
    assert admitted == sequences
    assert all(sequence.finish_reason for sequence in sequences)


def test_a_dialog_goes_on_in_its_slot(
    llama: Llama, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache holds of a text isn't read again, in its slot or copied from another's."""
    passed = passed_tokens(llama, monkeypatch)
    first = client.submit(PROMPTS[2], temperature=0, max_gen_len=20)
    client.run()
    others = [client.submit(f"{i} ducks and", temperature=0, max_gen_len=4) for i in range(3)]
    client.run()
    text = first.prompt + first.tokens
    del passed[:]
    second = client.submit([*text, 20, 30], temperature=0, max_gen_len=1)
    client.run()
    assert second.slot == first.slot and sum(passed) <= 3
    assert {sequence.slot for sequence in others}.isdisjoint({first.slot})
    # Two at once that begin alike: one takes the slot, the other a copy.
    del passed[:]
    both = [client.submit([*text, 20, i], temperature=0, max_gen_len=1) for i in (40, 50)]
    client.run()
    assert sum(passed) == 2, "a beginning that a slot holds was read again"
    for sequence in both:
        expected, _ = Llama(llama.model, llama.tokenizer).generate([sequence.prompt], 1, 0)
        assert sequence.tokens == expected[0]


def test_equal_prompts_are_read_once(
    llama: Llama, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the choices of one request are: the others wait until the first one is read."""
    passed = passed_tokens(llama, monkeypatch)
    sequences = [client.sequence(PROMPTS[2], temperature=0, max_gen_len=1) for _ in range(4)]
    client.engine.submit(sequences)
    client.run()
    n = len(sequences[0].prompt)
    assert n > 100 and sum(passed) == n + 3
    assert len({tuple(sequence.tokens) for sequence in sequences}) == 1


@pytest.mark.slow
def test_slots_change_hands_by_copies_of_copies(llama: Llama, client: Client) -> None:
    """Slots are taken, copied and taken again before a pass; each text stays the one alone."""
    rng = random.Random(11)
    for _ in range(6):
        beginnings = [PROMPTS[2], PROMPTS[5], PROMPTS[2] + PROMPTS[0]]
        prompts = [rng.choice(beginnings) + str(rng.randrange(5)) for _ in range(5)]
        sequences = [client.submit(prompt, temperature=0, max_gen_len=3) for prompt in prompts]
        client.run()
        for sequence, prompt in zip(sequences, prompts, strict=True):
            alone = Llama(llama.model, llama.tokenizer).text_completion([prompt], 0, max_gen_len=3)
            assert client.texts[sequence] == alone[0]["generation"], "a slot held another's text"
            # That call has overwritten slots which the engine believes in.
        client.engine.forget()


def test_a_cache_in_eight_bits(tiny_tokenizer: Tokenizer) -> None:
    model = make_model(vocab_size=768, max_batch_size=3)
    model.allocate_buffers(torch.device("cpu"), torch.float32, int8_cache=True)
    check_sequences_come_and_go(Llama(model, tiny_tokenizer))


def test_scores_and_alternatives(llama: Llama, client: Client) -> None:
    """The alternatives are those with the greatest log-probabilities, prompts' included."""
    settings: dict[str, Any] = {"temperature": 0, "max_gen_len": 8, "logprobs": True, "echo": True}
    first = client.submit(PROMPTS[0], top_logprobs=3, **settings)
    client.submit(PROMPTS[2], temperature=1.0)
    client.run()
    ids = first.prompt + first.tokens
    logprobs = llama.model(torch.tensor([ids]))[0].log_softmax(-1)
    assert first.prompt_logprobs[0] == 0 and first.prompt_top_logprobs[0] == []
    scores = first.prompt_logprobs + first.logprobs
    tops = first.prompt_top_logprobs + first.top_logprobs
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
    client.step()
    sequence = llama.tasks.read([text], "mean")[0]
    client.texts[sequence] = ""
    client.engine.submit([sequence])
    client.run()
    assert sequence.finish_reason == "stop" and sequence.pooled is not None
    expected = Llama(llama.model, llama.tokenizer).embed([text])[0]
    assert torch.allclose(sequence.pooled, expected, atol=1e-4)
    alone = Llama(llama.model, llama.tokenizer).text_completion([PROMPTS[0]], 0)[0]
    assert client.texts[stream] == alone["generation"]


def test_a_pass_that_fails_ends_its_sequences_alone(
    llama: Llama, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged logits end the running sequences with an error; the next one is answered."""
    expected = client.submit("The cow", temperature=0, max_gen_len=5)
    client.run()
    sequence = client.submit("The cow", temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr(llama.model, "logits", lambda h: torch.full((len(h), 768), math.nan))
        with pytest.raises(NotFinite):
            client.step()
    assert sequence.finish_reason == "error" and not client.engine.n_running
    again = client.submit("The cow", temperature=0, max_gen_len=5)
    client.run()
    assert client.texts[again] == client.texts[expected] != ""


def test_cancelled_sequences_free_their_slots(client: Client) -> None:
    """At once, whether they are being decoded, read or wait; the others don't notice."""
    alone = client.submit(PROMPTS[1], temperature=0)
    client.run()
    writing = client.submit(PROMPTS[0], temperature=0)
    other = client.submit(PROMPTS[1], temperature=0)
    client.run(until=lambda: len(other.tokens) > 3)
    reading = client.submit("The sun was warm. " * 30, temperature=0)
    client.step()
    more = [client.submit("The cow") for _ in range(2)]
    client.step()
    assert reading.is_prefilling and more[1].slot is None
    for sequence in (writing, reading, more[1]):
        client.engine.cancel(sequence)
        assert sequence.finish_reason == "cancelled"
    assert client.engine.n_running == 2
    client.run()
    assert client.texts[other] == client.texts[alone]


def test_smooth_streams_or_a_batch_that_is_done_soon(llama: Llama) -> None:
    """A script reads long prompts whole beside decoding: nobody waits for a single stream."""
    client = Client(llama)
    client.engine.prefill_beside_decoding = Engine(
        llama.model, llama.tokenizer
    ).prefill_beside_decoding
    stream = client.submit("The cow", temperature=0)
    client.step()
    long = client.submit("The sun was warm. " * 30, temperature=0)
    client.step()
    assert not long.is_prefilling and len(long.prompt) > 128 and len(stream.tokens) == 2


def test_long_prompts_go_in_pieces_and_their_logits_are_not_made(
    checkpoint_dir, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = Llama.build(checkpoint_dir(), max_seq_len=1200, device="cpu", dtype=torch.float32)
    forward, passes = llama.model.hidden_states, []

    def watched(tokens: torch.Tensor, segments: list, select: torch.Tensor | None) -> torch.Tensor:
        calls = llama.model.backend.layout(segments, tokens.device).calls
        masks = [call.mask for call in calls if isinstance(call, Span)]
        assert all(mask is None or mask.shape[0] <= 512 for mask in masks)
        logits = forward(tokens, segments, select)
        passes.append((len(tokens), len(logits)))
        return logits

    monkeypatch.setattr(llama.model, "hidden_states", watched)
    llama.generate([[i] + [1] * 1099 for i in range(5)], 1)
    assert sum(tokens for tokens, _ in passes) == 5 * 1100
    assert max(tokens for tokens, _ in passes) <= 2048
    assert sum(logits for _, logits in passes) == 5


def test_long_pieces_stand_behind_the_others(llama: Llama) -> None:
    """A failure means a call of attention for each change between decoding and reading."""
    client = Client(llama)
    client.engine.prefill_beside_decoding = 2048
    texts = ["The cow", "The sun was warm. " * 9, "One day", "Tom ran to the river. " * 9]
    client.submit(texts[0], temperature=0, max_gen_len=20)
    client.step()
    for text in texts[1:]:
        client.submit(text, temperature=0, max_gen_len=20)
    client.engine._admit()
    lengths = [len(piece.tokens) for piece in client.engine._schedule()]
    assert [length > 16 for length in lengths] == [False, False, True, True]
