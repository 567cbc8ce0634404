"""Generation, on the embedded model: right in batches, streams and log-probabilities."""

import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from conftest import follow_script, make_model

from llama import Dialog, Llama, Tokenizer
from llama.chat.formats import FORMATS
from llama.chat.prompts import UNSAFE_ERROR
from llama.engine import engine
from llama.engine.results import StreamPiece
from llama.generation import TINY
from llama.guards import StreamGuard, Verdict, guarded, refusal
from llama.sampling import SamplingParams

STORY = "Once upon a time, there was a little girl named Mia."
PROMPTS = [STORY, "Sam", "One sunny morning, Tom went to the park. He took", "", "The cow"]


def ask(*turns: str, system: str | None = None) -> Dialog:
    roles = ("user", "assistant")
    dialog = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *dialog] if system else dialog


def encode(llama: Llama, text: str) -> list[int]:
    return llama.tokenizer.encode(text, bos=True, eos=False)


class TestRaggedBatches:
    def test_greedy_ids_are_those_of_each_row_alone(self, tiny: Llama) -> None:
        prompts = [encode(tiny, p) for p in PROMPTS]
        together, _ = tiny.generate(prompts, 64, temperature=0)
        for prompt, row in zip(prompts, together, strict=True):
            assert tiny.generate([prompt], 64, temperature=0)[0] == [row]

    def test_sampled_ids_do_not_depend_on_neighbours_or_splits(self, tiny: Llama) -> None:
        prompts = [encode(tiny, p) for p in PROMPTS]
        many = prompts * 4  # 20 rows through a cache of 8
        rows, _ = tiny.generate(many, 32, temperature=0.9, top_p=0.95, seed=5)
        again, _ = tiny.generate(many, 32, temperature=0.9, top_p=0.95, seed=5)
        few, _ = tiny.generate(prompts, 32, temperature=0.9, top_p=0.95, seed=5)
        assert rows == again
        assert rows[: len(prompts)] == few
        assert len({tuple(r) for r in rows[::5]}) > 1  # the same prompt in other rows: other draws

    def test_seeds_matter_and_a_build_repeats_itself(self, tiny: Llama) -> None:
        def two(llama: Llama) -> list[str]:
            return [llama.text_completion([STORY], 1.0, 1.0, 48)[0]["generation"] for _ in range(2)]

        first = two(Llama(tiny.model, tiny.tokenizer, seed=7))
        assert first == two(Llama(tiny.model, tiny.tokenizer, seed=7))
        assert first[0] != first[1]
        assert first != two(Llama(tiny.model, tiny.tokenizer, seed=8))

    def test_prompts_longer_than_a_piece_give_the_same(
        self, tiny: Llama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = [encode(tiny, p) for p in (STORY * 8, "Sam", STORY * 5)]
        whole = tiny.generate(prompts, 40, temperature=0, logprobs=True, echo=True)
        monkeypatch.setattr(tiny.model, "prefill_tokens", 13)
        monkeypatch.setattr(engine, "PREFILL_TOKENS", 30)
        pieces = tiny.generate(prompts, 40, temperature=0, logprobs=True, echo=True)
        assert pieces[0] == whole[0]
        for ours, theirs in zip(pieces[1], whole[1], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


class TestLogprobs:
    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_they_equal_a_plain_forward_pass(self, tiny: Llama, temperature: float) -> None:
        prompts = [encode(tiny, p) for p in PROMPTS]
        tokens, logprobs = tiny.generate(
            prompts, 40, temperature=temperature, logprobs=True, echo=True, seed=1
        )
        for row, scores in zip(tokens, logprobs, strict=True):
            assert len(row) == len(scores)
            logits = tiny.model(torch.tensor([row]), 0)[0].double().log_softmax(-1)
            plain = [0.0, *(logits[i, t].item() for i, t in enumerate(row[1:]))]
            assert scores == pytest.approx(plain, abs=1e-4)
        alone, new = tiny.generate(prompts, 40, temperature=temperature, logprobs=True, seed=1)
        for row, scores, prompt, some, few in zip(
            tokens, logprobs, prompts, alone, new, strict=True
        ):
            assert row[len(prompt) :] == some
            assert scores[len(prompt) :] == pytest.approx(few, abs=1e-5)

    def test_a_prompt_that_fills_the_cache_is_scored_and_not_continued(self, tiny: Llama) -> None:
        ids = encode(tiny, STORY * 40)[:512]
        tokens, logprobs = tiny.generate([ids], 5, logprobs=True, echo=True)
        assert tokens == [ids]
        assert len(logprobs[0]) == 512
        assert logprobs[0][0] == 0.0
        assert all(score < 0 for score in logprobs[0][1:])
        assert tiny.generate([ids], 5) == ([[]], None)

    def test_tasks_return_pieces_and_scores_for_each_token(self, tiny: Llama) -> None:
        for result in (
            tiny.text_completion([STORY], 0, max_gen_len=9, logprobs=True)[0],
            tiny.chat_completion([ask("What does the cow say?")], 0, logprobs=True)[0],
            tiny.text_infilling(["def add(a, b):\n    "], ["\n"], 0, logprobs=True)[0],
        ):
            assert len(result["tokens"]) == len(result["logprobs"]) > 0
        assert "".join(result["tokens"]).replace("▁", " ") == result["generation"]

    def test_without_asking_there_are_none(self, tiny: Llama) -> None:
        result = tiny.text_completion([STORY], max_gen_len=3)[0]
        assert set(result) == {"generation", "finish_reason", "stop_reason"}


class TestLengths:
    def test_each_row_gets_what_the_cache_leaves_it(self, checkpoint_dir) -> None:
        llama = Llama.build(checkpoint_dir(), max_seq_len=64, dtype=torch.float32, device="cpu")
        llama.tokenizer.eos_id = 10**9  # random weights shall not end early
        rows, _ = llama.generate([[1] * 60, [1] * 10, [1] * 64], 20, temperature=0)
        assert [len(row) for row in rows] == [4, 20, 0]
        rows, _ = llama.generate([[1] * 60], 0)
        assert rows == [[]]
        text = llama.text_completion(["a"], 0)[0]["generation"]
        assert len(llama.tokenizer.encode(text, False, False)) > 0

    def test_echo_puts_the_prompt_in_front(self, tiny: Llama) -> None:
        plain = tiny.text_completion([STORY], 0, max_gen_len=20)[0]["generation"]
        echoed = tiny.text_completion([STORY], 0, max_gen_len=20, echo=True)[0]["generation"]
        assert echoed == f"{STORY} {plain}"

    def test_eos_in_a_prompt_does_not_end_it(self, tiny: Llama) -> None:
        ids = [1, *encode(tiny, "Hello"), tiny.tokenizer.eos_id, *encode(tiny, STORY)]
        tokens, _ = tiny.generate([ids], 10, temperature=0, echo=True)
        assert len(tokens[0]) == len(ids) + 10


class TestStop:
    def test_a_stop_token_ends_a_row_and_is_left_out(self, tiny: Llama) -> None:
        ids = encode(tiny, STORY)
        full = tiny.generate([ids], 30, temperature=0)[0][0]
        stop = full[8]
        assert (
            tiny.generate([ids], 30, temperature=0, stop_token=stop)[0][0]
            == full[: full.index(stop)]
        )

    def test_stop_strings_are_looked_for_after_the_prompt_only(self, tiny: Llama) -> None:
        full = tiny.text_completion([STORY], 0, max_gen_len=60)[0]["generation"]
        result = tiny.text_completion(
            [STORY], 0, max_gen_len=60, stop=["named Mia", "."], logprobs=True
        )[0]
        assert result["generation"] == full[: full.index(".")]
        assert "".join(result["tokens"]).replace("▁", " ").strip() == result["generation"]
        assert len(result["tokens"]) == len(result["logprobs"])
        echoed = tiny.text_completion([STORY], 0, max_gen_len=60, stop=["."], echo=True)[0]
        assert echoed["generation"] == f"{STORY} {result['generation']}"

    def test_stop_strings_may_come_from_a_generator(self, tiny: Llama) -> None:
        result = tiny.text_completion([STORY], 0, max_gen_len=60, stop=(s for s in ["."]))
        assert "." not in result[0]["generation"]

    def test_generate_takes_stop_strings_too(self, tiny: Llama) -> None:
        ids = encode(tiny, STORY)
        full = tiny.generate([ids], 60, temperature=0)[0][0]
        cut = tiny.generate([ids], 60, temperature=0, stop=["."])[0][0]
        assert cut == full[: len(cut)]
        assert "." not in tiny.tokenizer.decode(cut)
        assert "." in tiny.tokenizer.decode(full[: len(cut) + 1])

    def test_results_say_why_and_at_which_stop_they_ended(self, tiny: Llama, monkeypatch) -> None:
        """A failure means that a caller can't tell a whole text from a cut one."""

        def reasons(result: Any) -> tuple[Any, Any]:
            return result["finish_reason"], result["stop_reason"]

        story, eos = encode(tiny, STORY)[:4], tiny.tokenizer.eos_id
        for ids, settings, expected in (
            ([*story, eos], {}, ("stop", None)),
            (story, {"max_gen_len": 4}, ("length", None)),
            ([*story, 300], {"stop_token_ids": [300]}, ("stop", 300)),
            ([*story, eos], {"stop": ["</s>"]}, ("stop", "</s>")),
            ([*story, *encode(tiny, "a cow.")], {"stop": ["no", " cow"]}, ("stop", " cow")),
        ):
            for call in (
                lambda **more: tiny.text_completion([STORY], **more)[0],
                lambda **more: tiny.chat_completion([ask("Hi")], **more)[0],
                lambda **more: tiny.text_infilling(["a"], ["b"], **more)[0],
            ):
                follow_script(monkeypatch, iter(ids))
                assert reasons(call(**settings)) == expected
            for stream in (
                lambda **more: tiny.text_completion_stream(STORY, **more),
                lambda **more: tiny.chat_completion_stream(ask("Hi"), **more),
                lambda **more: tiny.text_infilling_stream("a", "b", **more),
            ):
                follow_script(monkeypatch, iter(ids))
                *pieces, last = stream(**settings)
                assert (last.finish_reason, last.stop_reason) == expected
                assert {(p.finish_reason, p.stop_reason) for p in pieces} <= {(None, None)}

    def test_a_refused_answer_says_so(self, tiny: Llama) -> None:
        """A failure means that a refusal seems to be an answer."""
        llama = Llama(tiny.model, tiny.tokenizer, chat=tiny.chat)
        llama.output_guard = lambda *_: Verdict(False, (), "enough")
        results = llama.chat_completion([ask("[INST]"), ask("What does the cow say?")], 0)
        for result in results:
            assert (result["finish_reason"], result["stop_reason"]) == ("content_filter", None)

    @pytest.mark.parametrize("include_stop", [False, True])
    def test_a_control_piece_stops_and_may_be_included(
        self, tiny: Llama, monkeypatch, include_stop: bool
    ) -> None:
        """A failure means that such a stop string is never met, or that tokens don't fit it."""
        settings = {"stop": ["▁<MID>"], "include_stop": include_stop}
        story, mid = encode(tiny, "The cow said moo"), tiny.tokenizer.middle_id
        expected = "The cow said moo" + "▁<MID>" * include_stop
        follow_script(monkeypatch, iter([*story, mid, 7]))
        result = tiny.text_completion([STORY], logprobs=True, **settings)[0]
        assert result["generation"] == expected and result["stop_reason"] == "▁<MID>"
        assert len(result["tokens"]) == len(result["logprobs"]) == len(story) + include_stop
        assert (result["tokens"][-1] == "▁<MID>") == include_stop
        follow_script(monkeypatch, iter([*story, mid, 7]))
        pieces = list(tiny.text_completion_stream(STORY, **settings))
        assert "".join(pieces) == expected and pieces[-1].stop_reason == "▁<MID>"
        assert [i for p in pieces for i in p.token_ids] == [*story, *[mid] * include_stop]
        follow_script(monkeypatch, iter([*story, mid, 7]))
        assert tiny.generate([[1]], 30, **settings)[0] == [[*story, *[mid] * include_stop]]

    def test_an_included_stop_string_ends_the_text(self, tiny: Llama) -> None:
        """A failure means that streams and whole texts differ, or tokens don't fit the text."""
        settings = {"temperature": 0, "max_gen_len": 60, "stop": ["."]}
        plain = tiny.text_completion([STORY], **settings)[0]["generation"]
        settings["include_stop"] = True
        result = tiny.text_completion([STORY], logprobs=True, **settings)[0]
        assert result["generation"] == f"{plain}."
        assert "".join(result["tokens"]).replace("▁", " ").strip() == f"{plain}."
        pieces = list(tiny.text_completion_stream(STORY, **settings))
        assert "".join(pieces) == f"{plain}."
        assert sum(len(piece.token_ids) for piece in pieces) == len(result["tokens"])

    def test_the_end_of_sequence_can_be_ignored(self, tiny: Llama, monkeypatch) -> None:
        """A failure means that benchmarks of a fixed length end early, or stops are lost."""
        story, eos = encode(tiny, "The cow"), tiny.tokenizer.eos_id
        ids = [*story, eos, tiny.tokenizer.eot_id, *encode(tiny, "said moo")]
        for call in (
            lambda **more: tiny.text_completion([STORY], **more)[0],
            lambda **more: tiny.text_infilling(["a"], ["b"], **more)[0],
        ):
            follow_script(monkeypatch, iter(ids))
            result = call(ignore_eos=True, max_gen_len=len(ids), logprobs=True)
            assert result["generation"].strip() == "The cow said moo"
            assert result["finish_reason"] == "length" and len(result["tokens"]) == len(ids)
        follow_script(monkeypatch, iter(ids))
        result = tiny.text_completion([STORY], ignore_eos=True, stop=["said"])[0]
        assert result["generation"] == "The cow " and result["stop_reason"] == "said"
        follow_script(monkeypatch, iter(ids))
        answer = tiny.chat_completion([ask("Hi")], ignore_eos=True, stop_token_ids=[eos])[0]
        assert answer["generation"]["content"] == "The cow" and answer["stop_reason"] == eos

    def test_a_formats_own_end_is_no_reason_and_isnt_included(
        self, tiny: Llama, monkeypatch
    ) -> None:
        """A failure means that the next speaker's mark becomes part of an answer."""
        llama = Llama(tiny.model, tiny.tokenizer, chat=FORMATS["korani"])
        ids = encode(tiny, "It says moo.\n### Human: And")
        for more in ({"include_stop": True}, {"stop": ["nothing"]}):
            follow_script(monkeypatch, iter(ids))
            answer = llama.chat_completion([ask("Hi")], **more)[0]
            assert answer["generation"]["content"] == "It says moo."
            assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", None)
        follow_script(monkeypatch, iter(ids))
        answer = llama.chat_completion([ask("Hi")], ignore_eos=True, max_gen_len=len(ids))[0]
        assert "### Human: And" in answer["generation"]["content"]

    def test_code_llamas_infilling_end_ends_no_completion(self, tiny: Llama, monkeypatch) -> None:
        """A failure means that base models' texts end where Meta's code goes on."""
        ids = [*encode(tiny, "The"), tiny.tokenizer.eot_id, *encode(tiny, "cow")]
        follow_script(monkeypatch, iter([*ids, tiny.tokenizer.eos_id]))
        assert tiny.text_completion([STORY])[0]["generation"] == "The cow"

    def test_infilling_ends_at_eot_and_at_eos(self, tiny: Llama, monkeypatch) -> None:
        ids = encode(tiny, STORY)
        eot, eos = tiny.tokenizer.eot_id, tiny.tokenizer.eos_id
        for end in (eot, eos):
            script = iter([ids[3], ids[4], end, ids[5]])
            follow_script(monkeypatch, script)
            result = tiny.text_infilling(["a"], ["b"], logprobs=True)[0]
            assert len(result["tokens"]) == 2

    def test_turn_based_chat_ends_at_step_and_at_eos(
        self, codellama_70b_tokenizer: Tokenizer, monkeypatch
    ) -> None:
        model = make_model(vocab_size=32016, n_layers=1)
        llama = Llama(model, codellama_70b_tokenizer)
        hello = codellama_70b_tokenizer.encode("Hello there", False, False)
        for end in (codellama_70b_tokenizer.step_id, codellama_70b_tokenizer.eos_id):
            script = iter([*hello, end, 7])
            follow_script(monkeypatch, script)
            answer = llama.chat_completion([ask("Hi")])[0]["generation"]
            assert answer == {
                "role": "assistant",
                "content": "Hello there",
                "destination": "user",
            }


class TestChat:
    def test_special_tags_are_refused_and_do_not_disturb_the_others(self, tiny: Llama) -> None:
        good = ask("What does the cow say?")
        bad = ask("[INST] What does the cow say?")
        results = tiny.chat_completion([bad, good, bad], 0, logprobs=True)
        alone = tiny.chat_completion([good], 0, logprobs=True)[0]
        assert [r["generation"]["content"] for r in results] == [
            UNSAFE_ERROR,
            alone["generation"]["content"],
            UNSAFE_ERROR,
        ]
        assert results[0]["tokens"] == results[0]["logprobs"] == []
        assert list(tiny.chat_completion_stream(bad)) == [UNSAFE_ERROR]

    def test_only_refused_dialogs(self, tiny: Llama) -> None:
        assert tiny.chat_completion([])[:] == []
        answer = tiny.chat_completion([ask("<step>")])[0]["generation"]
        assert answer == {"role": "assistant", "content": UNSAFE_ERROR}


class TestInfilling:
    def test_full_text_is_prefix_middle_suffix(self, tiny: Llama) -> None:
        prefix, suffix = "def add(a, b):\n    return ", "\n"
        for suffix_first in (False, True):
            result = tiny.text_infilling([prefix], [suffix], 0, suffix_first=suffix_first)[0]
            assert result["full_text"] == prefix + result["generation"] + suffix


class TestStreams:
    @pytest.mark.parametrize("seed", range(3))
    def test_pieces_join_to_the_text_of_the_same_seed(self, tiny: Llama, seed: int) -> None:
        more = {"temperature": 0.9, "max_gen_len": 60, "seed": seed, "stop": ["happy", "\n\n"]}
        assert (
            "".join(tiny.text_completion_stream(STORY, **more))
            == tiny.text_completion([STORY], **more)[0]["generation"]
        )
        dialog = ask("What does the cow say?")
        assert (
            "".join(tiny.chat_completion_stream(dialog, **more))
            == tiny.chat_completion([dialog], **more)[0]["generation"]["content"]
        )
        for suffix_first in (False, True):
            pair = ("def add(a, b):\n    ", "\n\n\n")
            assert (
                "".join(tiny.text_infilling_stream(*pair, suffix_first=suffix_first, **more))
                == tiny.text_infilling([pair[0]], [pair[1]], suffix_first=suffix_first, **more)[0][
                    "generation"
                ]
            )

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"max_gen_len": 20}, "length"),
            ({"max_gen_len": 60, "stop": ["."]}, "stop"),
            ({"max_gen_len": 60, "stop": ["Mia wanted to", "kite"]}, None),
            ({"max_gen_len": 60, "prompt_lookup_num_tokens": 5}, None),
            ({"max_gen_len": 0}, "length"),
        ],
    )
    def test_pieces_have_the_tokens_of_the_completion_and_the_last_one_the_reason(
        self, tiny: Llama, settings: dict[str, Any], reason: str | None
    ) -> None:
        """A failure means that a stream's reader can't count tokens, or misses the end."""
        sequence = tiny.tasks.text([STORY], SamplingParams(temperature=0, **settings))[0]
        tiny.reset_cache()
        pieces = list(tiny.text_completion_stream(STORY, temperature=0, **settings))
        tiny.engine.submit([sequence])
        while sequence.finish_reason is None:
            tiny.engine.step()
        assert all(type(piece) is StreamPiece for piece in pieces)
        assert "".join(pieces) == sequence.text
        assert [i for piece in pieces for i in piece.token_ids] == sequence.tokens
        assert sum(len(piece.logprobs) for piece in pieces) == len(sequence.tokens)
        reasons = [piece.finish_reason for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + [sequence.finish_reason]
        assert reason in (None, reasons[-1])

    def test_a_guarded_stream_has_the_tokens_of_what_it_shows(self, tiny: Llama) -> None:
        """A failure means that tokens of held-back text get out, or that allowed ones are lost."""

        def stream() -> Generator[StreamPiece, None, None]:
            return tiny.text_completion_stream(STORY, 0, max_gen_len=60)

        def ids(pieces: list[StreamPiece]) -> list[int]:
            return [i for piece in pieces for i in piece.token_ids]

        plain = list(stream())
        allowed = list(guarded(stream(), StreamGuard([], lambda *_: Verdict(True), every=40)))
        assert "".join(allowed) == "".join(plain) and len(allowed) > 2
        assert ids(allowed) == ids(plain)
        assert [p.finish_reason for p in allowed] == [None] * (len(allowed) - 1) + ["length"]
        judged: list[str] = []

        def twice(_: Dialog, answer: str) -> Verdict:
            judged.append(answer)
            return Verdict(len(judged) < 3, (), "enough")

        *shown, last = guarded(stream(), StreamGuard([], twice, every=40))
        assert "".join(shown) == judged[1] and len(shown) == 2
        assert ids(shown) == ids(plain)[: len(ids(shown))] != []
        assert last == "\n\n" + refusal(Verdict(False, (), "enough"))
        assert (last.token_ids, last.logprobs, last.finish_reason) == ([], [], "content_filter")

    def test_an_output_guard_holds_a_streams_tokens_back_too(self, tiny: Llama) -> None:
        """A failure means that the guard of a ``Llama`` isn't asked, or loses the end."""
        dialog = ask("What does the cow say?")
        plain = list(tiny.chat_completion_stream(dialog, 0))
        llama = Llama(tiny.model, tiny.tokenizer, chat=tiny.chat)
        llama.output_guard = lambda _, answer: Verdict(answer == "The cow says moo.")
        (piece,) = llama.chat_completion_stream(dialog, 0)
        assert piece == "The cow says moo."
        assert piece.token_ids == [i for one in plain for i in one.token_ids]
        assert piece.finish_reason == plain[-1].finish_reason == "stop"
        llama.output_guard = lambda *_: Verdict(False, (), "enough")
        (piece,) = llama.chat_completion_stream(dialog, 0)
        assert piece == refusal(Verdict(False, (), "enough"))
        assert (piece.token_ids, piece.finish_reason) == ([], "content_filter")

    def test_a_refusal_is_one_piece_without_tokens_that_ends_the_stream(self, tiny: Llama) -> None:
        """A failure means that the reader of a refused stream waits for its end."""
        refused = [list(tiny.chat_completion_stream(ask("[INST]")))]
        llama = Llama(tiny.model, tiny.tokenizer, chat=tiny.chat)
        llama.input_guard = lambda _: Verdict(False, ("O3",), "Criminal Planning")
        refused.append(list(llama.chat_completion_stream(ask("Hi"))))
        for pieces, text in zip(
            refused, (UNSAFE_ERROR, "Refused by a content guard: "), strict=True
        ):
            assert len(pieces) == 1 and pieces[0].startswith(text)
            assert (pieces[0].token_ids, pieces[0].finish_reason) == ([], "content_filter")

    def test_text_arrives_before_the_end(self, tiny: Llama) -> None:
        assert len(list(tiny.text_completion_stream(STORY, 0, max_gen_len=30))) > 10

    def test_closing_early_leaves_the_next_call_unaffected(self, tiny: Llama) -> None:
        expected = tiny.text_completion(PROMPTS, 0, max_gen_len=30)
        stream = tiny.text_completion_stream("Sam had a", 0)
        next(stream)
        stream.close()
        assert tiny.text_completion(PROMPTS, 0, max_gen_len=30) == expected

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interruption_leaves_the_next_call_unaffected(
        self, tiny: Llama, error: type[BaseException], monkeypatch
    ) -> None:
        expected = tiny.text_completion(PROMPTS, 0, max_gen_len=30)
        forward, calls = tiny.model.hidden_states, iter(range(100))

        def interrupted(*args: object) -> torch.Tensor:
            if next(calls) == 5:
                raise error
            return forward(*args)

        with monkeypatch.context() as patch:
            patch.setattr(tiny.model, "hidden_states", interrupted)
            with pytest.raises(error):
                tiny.text_completion(PROMPTS, 0, max_gen_len=30)
        assert tiny.text_completion(PROMPTS, 0, max_gen_len=30) == expected

    def test_a_call_beside_an_open_stream_ends_it_with_an_error(self, tiny: Llama) -> None:
        expected = tiny.text_completion(PROMPTS, 0, max_gen_len=30)
        stream = tiny.text_completion_stream("Sam had a", 0)
        next(stream)
        assert tiny.text_completion(PROMPTS, 0, max_gen_len=30) == expected
        with pytest.raises(RuntimeError, match="another call has used this Llama"):
            next(stream)
        assert tiny.text_completion(PROMPTS, 0, max_gen_len=30) == expected

    def test_other_threads_wait_for_an_open_stream(self, tiny: Llama) -> None:
        expected = tiny.text_completion([STORY], 0, max_gen_len=20)
        stream = tiny.text_completion_stream(STORY, 0, max_gen_len=20)
        pieces, results = [next(stream)], []
        thread = threading.Thread(
            target=lambda: results.append(tiny.text_completion([STORY], 0, max_gen_len=20))
        )
        thread.start()
        thread.join(timeout=0.5)
        assert thread.is_alive()
        pieces += stream
        thread.join(timeout=30)
        assert results == [expected]
        assert "".join(pieces) == expected[0]["generation"]

    def test_a_stream_may_be_handed_to_another_thread_which_may_then_call(
        self, tiny: Llama
    ) -> None:
        stream = tiny.text_completion_stream(STORY, 0, max_gen_len=20)
        next(stream)

        def go_on_and_call() -> None:
            next(stream)
            tiny.text_completion([STORY], 0, max_gen_len=3)

        thread = threading.Thread(target=go_on_and_call)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive()

    def test_streams_of_refused_dialogs_can_be_closed_too(self, tiny: Llama) -> None:
        tiny.chat_completion_stream(ask("[INST]")).close()

    def test_mistakes_are_told_before_the_first_piece(self, tiny: Llama) -> None:
        with pytest.raises(ValueError, match="temperature"):
            tiny.text_completion_stream(STORY, temperature=-1)


def test_calls_from_several_threads_do_not_mix(tiny: Llama) -> None:
    expected = [tiny.text_completion([p], 0, max_gen_len=24)[0] for p in PROMPTS]
    results: dict[int, object] = {}

    def work(i: int) -> None:
        results[i] = tiny.text_completion([PROMPTS[i]], 0, max_gen_len=24)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [results[i] for i in range(len(PROMPTS))] == expected


class TestNonsense:
    def test_weights_that_give_nonsense_are_named_and_later_calls_unaffected(
        self, checkpoint_dir
    ) -> None:
        llama = Llama.build(checkpoint_dir(), max_seq_len=64, device="cpu", dtype=torch.float32)
        prompts = [[1, 20], [1] * 40]
        expected = llama.generate(prompts, 3, temperature=0)
        embedding = llama.model.tok_embeddings.weight[7].clone()
        llama.model.tok_embeddings.weight[7] = float("nan")
        for prompt in ([7] * 30, [7] * 64):
            with pytest.raises(RuntimeError, match="logits are not finite"):
                llama.generate([prompt], 3, logprobs=True, echo=True)
        llama.model.tok_embeddings.weight[7] = embedding
        assert llama.generate(prompts, 3, temperature=0) == expected


@pytest.fixture(scope="module")
def default_tiny() -> Iterator[Llama]:
    yield Llama.build()


def test_the_default_build_answers(default_tiny: Llama) -> None:
    answer = default_tiny.chat_completion([ask("What does the cow say?")], 0)[0]
    assert answer["generation"] == {"role": "assistant", "content": "The cow says moo."}
    assert default_tiny.tokenizer.n_words == default_tiny.model.params.vocab_size
    assert (TINY / "params.json").is_file()
