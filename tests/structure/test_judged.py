"""Answers of the embedded model: all of them parse, and are valid by their schemas."""

import json
import sys
from pathlib import Path

import pytest
from processes import forked, script

from llama import Llama, SamplingParams
from llama.server import workers
from llama.structure import trial

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import schemas
import structure

COUNT = 20
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"enum": [1, 22, 333]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
DIALOG = [{"role": "user", "content": "What does the cow say?"}]


def test_the_schemas_are_of_many_kinds() -> None:
    """A failure means that fewer kinds are tried than the documentation says."""
    cases = schemas.cases()
    assert len(cases) == len({json.dumps(case.schema) for case in cases}) == 200
    assert sum(case.is_bounded for case in cases) > 100
    words = {key for case in cases for key in json.dumps(case.schema).split('"')}
    assert words > {"anyOf", "oneOf", "allOf", "$ref", "prefixItems", "pattern", "multipleOf"}


def test_what_the_judge_refuses() -> None:
    """A failure means that wrong answers are counted as valid."""
    cases = [schemas.Case("x", SCHEMA, True)] * 5 + [schemas.Case("y", {}, False)]
    answers = [
        '{"name":"a","n":1}',
        '{"name": "a","n":1}',
        '{"name":"a","n":2}',
        '{"name":"a"',
        '{"name":"a…',
        "[1…",
    ]
    found = structure.judged(cases, answers)
    assert (found.valid, found.cut, len(found.wrong)) == (1, 1, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "temperature",
    [structure.TEMPERATURES[0]]
    + [pytest.param(each, marks=pytest.mark.soak) for each in structure.TEMPERATURES[1:]],
)
def test_all_answers_are_valid(tiny: Llama, temperature: float) -> None:
    """A failure means that an answer doesn't have the form that was asked for."""
    cases = schemas.cases(COUNT)
    answers = structure.batch(tiny, cases, temperature, 100)
    found = structure.judged(cases, answers)
    assert found.wrong == [] and found.valid > COUNT / 2
    assert structure.streams(tiny, cases, temperature, 100) == answers


def test_every_task_takes_a_form(tiny: Llama) -> None:
    how = {"response_format": FORM, "temperature": 1.5, "seed": 4}
    chat = tiny.chat_completion([DIALOG, DIALOG], **how)
    texts = [answer["generation"]["content"] for answer in chat]
    texts += [answer["generation"] for answer in tiny.text_completion(["One day"], **how)]
    texts += ["".join(tiny.text_completion_stream("One day", **how))]
    texts += ["".join(tiny.chat_completion_stream(DIALOG, **how))]
    texts += [a["generation"] for a in tiny.text_infilling(["a = "], ["\n"], **how)]
    assert [schemas.validated(text, SCHEMA) for text in texts] == [""] * 6
    assert all(answer["finish_reason"] == "stop" for answer in chat)
    ids, _ = tiny.generate([[1, 300]], 100, **how)
    assert schemas.validated(tiny.tokenizer.decode(ids[0]), SCHEMA) == ""


def test_an_echoed_prompt_isnt_part_of_the_form(tiny: Llama) -> None:
    form = {"type": "choice", "choice": [" Tom had"]}
    (answer,) = tiny.text_completion(["One day"], response_format=form, echo=True)
    assert answer["generation"].endswith("One day Tom had")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_drafts_change_nothing(tiny: Llama, temperature: float) -> None:
    """A failure means that a draft slips past the grammar."""
    dialog = [{"role": "user", "content": f"Say {json.dumps({'name': 'Tom', 'n': 22})} again."}]
    array = {"type": "array", "items": SCHEMA, "minItems": 4, "maxItems": 4}
    form = {"type": "json_schema", "schema": array}
    how = {"response_format": form, "temperature": temperature, "seed": 3}
    plain = tiny.chat_completion([dialog], **how)
    assert tiny.chat_completion([dialog], prompt_lookup_num_tokens=8, **how) == plain
    assert schemas.validated(plain[0]["generation"]["content"], array) == ""


def test_a_batch_may_be_partly_held_to_forms(tiny: Llama) -> None:
    forms = [None, FORM, {"type": "choice", "choice": ["moo", "baa"]}, {"type": "text"}]
    params = [SamplingParams(0, max_gen_len=40, response_format=form) for form in forms]
    sequences = [tiny.tasks.chat([DIALOG], each)[0] for each in params]
    tiny.engine.submit(sequences)
    while tiny.engine.n_running or tiny.engine.n_waiting:
        tiny.engine.step()
    free, held, choice, text = (sequence.text for sequence in sequences)
    assert free == text == "The cow says moo."
    assert schemas.validated(held, SCHEMA) == ""
    assert choice in ("moo", "baa")


def test_an_answer_whose_grammar_is_given_up_ends_alone(tiny: Llama) -> None:
    """A failure means that one sequence's grammar ends all others."""
    held, free = (
        tiny.tasks.chat([DIALOG], SamplingParams(0, max_gen_len=20, response_format=form))[0]
        for form in (FORM, None)
    )
    assert held.grammar is not None
    tiny.engine.submit([held, free])
    while tiny.engine.n_running or tiny.engine.n_waiting:
        if len(held.tokens) == 3 and held.grammar.error is None:
            held.grammar._fail("a limit")
        tiny.engine.step()
    assert held.finish_reason == "error" and len(held.tokens) == 3
    assert free.text == "The cow says moo."


def test_the_other_ranks_of_a_server_compile_what_rank_0_has_passed(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that ranks of a server run apart, or wait for a vote that none holds."""
    (sequence,) = tiny.tasks.chat([DIALOG], SamplingParams(response_format=FORM))
    monkeypatch.setattr(trial, "error_of", lambda *_: "a second trial")
    described = json.loads(json.dumps(workers._describe(sequence)))
    restored = workers._restore(described, tiny.engine)
    assert restored.grammar is not None and sequence.grammar is not None
    assert restored.grammar.masks([]).equal(sequence.grammar.masks([]))
    assert restored.params.response_format == FORM


def test_texts_that_begin_and_that_go_on_have_grammars_of_their_own(tiny: Llama) -> None:
    """A failure means that one of them may begin with a space that the other drops, or may not."""
    params = SamplingParams(response_format={"type": "regex", "regex": "moo"})
    on, begun = tiny.tasks.generate([[1, 5], [1, 5]], params, in_context=[True, False])
    assert on.grammar is not None and begun.grammar is not None
    space = tiny.tokenizer.encode("moo", bos=False, eos=False)[:1]
    assert tiny.tokenizer.token_piece(space[0]).startswith("▁")
    assert (on.grammar.accepted(space), begun.grammar.accepted(space)) == (0, 1)


RANKS = """
import json, os, sys
from llama import Llama
from llama.structure import trial
llama = Llama.build(device="cpu")
form, slow, dialog = json.loads(sys.argv[2])
how = {"response_format": form, "temperature": 1.5, "seed": 5, "prompt_lookup_num_tokens": 4}
if os.environ["RANK"] == "1":
    trial.error_of = None  # rank 0's verdict counts, and only rank 0 takes the time
found = []
for each in (form, slow, {"type": "json_schema", "schema": {"type": "foo"}}, form):
    trial.SECONDS = 0.3 if each == slow else 5
    try:
        answers = llama.chat_completion([dialog], **{**how, "response_format": each})
        found.append(answers[0]["generation"]["content"])
    except ValueError as error:
        found.append(str(error))
def broken(*_):
    raise RuntimeError("no process")
trial.error_of = broken
try:
    llama.chat_completion([dialog], response_format={"type": "choice", "choice": ["a", "b"]})
except RuntimeError as error:
    found.append(str(error))
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_ranks_agree(tmp_path: Path) -> None:
    """A failure means that a rank refuses what another answers, and waits for ever."""
    parts = [{"type": "string", "pattern": f"[a-z]{{{i}}}x{i}"} for i in range(1, 21)]
    slow = {"type": "json_schema", "schema": {"allOf": parts}}
    out = tmp_path / "rank"
    arguments = (script(tmp_path, RANKS), str(out), json.dumps([FORM, slow, DIALOG]))
    done = forked(*arguments, path=str(Path(__file__).parents[1]), n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(Path(f"{out}{rank}").read_text()) for rank in range(2))
    assert first == second
    assert schemas.validated(first[0], SCHEMA) == "" and first[3] == first[0]
    assert "it takes more than" in first[1] and "Invalid type: foo" in first[2]
    assert first[4] == "no process", "the other ranks wait for a verdict that never comes"
