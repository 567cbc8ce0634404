"""The tasks of lm-eval give what they give with its own ``hf`` model, to the log-likelihood."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.tasks import TaskManager
from processes import forked, lose_one_machine, script, two_machines, wait_until
from sqlitedict import SqliteDict

from llama import Llama
from llama.chat.formats import choose_chat
from llama.convert import convert
from llama.errors import NotFinite
from llama.evaluate.harness import LlamaLM

TASKS = Path(__file__).parents[1] / "data" / "tasks"
N_QUESTIONS = 8
MAX_LENGTH = 80  # less than a story has

# Scores pairs on two ranks, of which only rank 0 knows them.
SCORE = """
import json, sys, torch
from llama import Llama, parallel
from llama.evaluate.runner import Runner
from llama.evaluate.scoring import Pair, scores
from llama.server.workers import Workers, run_worker
llama = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=80, max_batch_size=3)
if parallel.rank() > 0:
    run_worker(llama, streams=False)
else:
    pairs = [Pair(*pair) for pair in json.load(open(sys.argv[1]))]
    print(json.dumps(dict(scores(Runner(llama.engine), llama.model.params, pairs))))
    Workers().stop()
"""

Answers = dict[str, list[Any]]
Evaluation = tuple[Answers, dict[str, dict[str, Any]]]


def evaluated(
    model: Any, tasks: list[str], limit: int | None = N_QUESTIONS, **options: Any
) -> Evaluation:
    """The answers to each task's requests, and its metrics."""
    results = lm_eval.simple_evaluate(
        model,
        tasks=tasks,
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        **options,
    )
    samples = results["samples"]
    answers = {task: [sample["resps"] for sample in samples[task]] for task in samples}
    return answers, results["results"]


def evaluated_all(model: Any, limit: int = N_QUESTIONS, **options: Any) -> Evaluation:
    """All tasks, of which those with a choice of capitals have examples."""
    plain = evaluated(model, ["animals", "animals_written", "stories"], limit, **options)
    shots = evaluated(model, ["capitals", "capitals_first"], limit, num_fewshot=2, **options)
    return plain[0] | shots[0], plain[1] | shots[1]


def difference(a: Any, b: Any) -> float:
    """The largest difference of two nested lists' numbers, which must else be equal.

    That of numbers beyond ten is taken of ten: processors round float32's sums differently.
    """
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max(map(difference, a, b), default=0.0)
    if isinstance(a, bool | str):
        assert a == b
        return 0.0
    return abs(float(a) - float(b)) / max(1.0, abs(float(a)) / 10)


def check_equal(found: Evaluation, expected: Evaluation) -> None:
    assert found[0].keys() == expected[0].keys()
    for task, answers in expected[0].items():
        assert difference(found[0][task], answers) < 1e-4, task
        numbers = {name: x for name, x in expected[1][task].items() if isinstance(x, float)}
        assert numbers, "no metric"
        for name, value in numbers.items():
            assert found[1][task][name] == pytest.approx(value, rel=1e-4), (task, name)


def theirs(path: Path, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(path), dtype="float32", device="cpu", batch_size=4, **options)


@pytest.fixture(scope="module")
def reference(saved: Path) -> Any:
    return theirs(saved, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def expected(reference: Any) -> Evaluation:
    return evaluated_all(reference)


@pytest.fixture(scope="module")
def model() -> LlamaLM:
    """Three slots, which never hold as many prompts as have the same length."""
    build = {"dtype": torch.float32, "device": "cpu", "max_seq_len": MAX_LENGTH}
    return LlamaLM(Llama.build(**build, max_batch_size=3))


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.slow
def test_every_task_gets_what_hf_gets(model: LlamaLM, expected: Evaluation) -> None:
    """A failure means that figures from here can't be compared with those that others publish."""
    check_equal(evaluated_all(model), expected)
    assert expected[1]["animals"]["acc,none"] > 0.9


@pytest.mark.slow
def test_two_processes_get_what_hf_and_one_get(
    model: LlamaLM, reference: Any, tmp_path: Path
) -> None:
    """A failure means that a model divided among processes is measured wrongly."""
    texts = ("The capital of France is", "One day, Sam saw a big cow", "The capital of Peru is")
    pairs = [(model.tok_encode(text), [ids, 30, 4]) for text in texts for ids in (9, 99)]
    pairs += [(pairs[0][0], [i]) for i in (5, 6, 7)] + [([1], pairs[0][0] * 5)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pairs))
    done = forked(script(tmp_path, SCORE), str(path), n=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    together = [found[str(i)] for i in range(len(pairs))]
    requests = [(("", ""), *pair) for pair in pairs]
    for one in (model, reference):
        assert difference(together, one._loglikelihood_tokens(requests)) < 1e-4


def test_what_prompts_share_is_read_once(model: LlamaLM) -> None:
    """A failure means that each of four choices reads its question again, or one that is a single
    token is more than a number beside the others."""
    counts = model.llama.engine.counts
    model.llama.reset_cache()
    read, reused, passes = counts.prompt_tokens, counts.reused_tokens, counts.passes
    context = list(range(300, 320))
    pairs = [(context[i:], [choice, 9]) for i in range(3) for choice in (5, 6, 7, 8)]
    model._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    assert counts.prompt_tokens - read == 21 + 20 + 19 + 9 * 2
    assert counts.reused_tokens - reused == 3 * (19 + 18 + 17)
    assert counts.passes - passes == 4  # three contexts at a time
    read = counts.prompt_tokens
    model._loglikelihood_tokens([(("", ""), context, [choice]) for choice in (5, 6, 7, 8)])
    assert counts.prompt_tokens - read == 1


def test_an_evaluation_goes_on_where_it_was(model: LlamaLM, tmp_path: Path) -> None:
    """A failure means that answers are lost with the process that got them."""
    requests = instances("loglikelihood", *(("One day,", f" {word}") for word in "abcdefghij"))
    expected = model.loglikelihood(requests)
    model._scores, scores = lambda pairs: cut(scores(pairs), 4), model._scores  # type: ignore
    first = CachingLM(model, str(tmp_path / "cache"))
    try:
        with pytest.raises(NotFinite):
            first.loglikelihood(requests)
    finally:
        model._scores = scores  # type: ignore[method-assign]
        first.dbdict.close()
    model.llama.engine.cancel_all()
    second = CachingLM(model, str(tmp_path / "cache"))
    assert len(second.dbdict) == 4
    asked = model.llama.engine.counts.passes
    assert difference(second.loglikelihood(requests), expected) < 1e-5
    assert model.llama.engine.counts.passes > asked
    asked = model.llama.engine.counts.passes
    assert difference(second.loglikelihood(requests), expected) < 1e-5
    assert model.llama.engine.counts.passes == asked
    second.dbdict.close()
    model.set_cache_hook(CacheHook(None))


def cut(items: Iterator[Any], n: int) -> Iterator[Any]:
    yield from islice(items, n)
    raise NotFinite


def test_answers_end_as_tasks_say(model: LlamaLM) -> None:
    """A failure means that a task's stop strings, length or sampling isn't what the model does."""
    prompt = "[INST] What does the cow say? [/INST]"

    def answer(**arguments: Any) -> str:
        [text] = model.generate_until(instances("generate_until", (prompt, arguments)))
        return text

    whole = answer(until=["\n"], max_gen_toks=20)
    assert whole.strip() == "The cow says moo."
    assert answer(until=[" says", ""], max_gen_toks=20) == whole.partition(" says")[0]
    assert answer(until="says", max_new_tokens=20) == whole.partition("says")[0]
    assert len(model.tok_encode(answer(until=[], max_gen_toks=3), False)) <= 4
    assert answer(do_sample=False, temperature=0.7, num_beams=1, max_gen_toks=20) == whole
    sampled = {answer(do_sample=True, temperature=9.0, max_gen_toks=8) for _ in range(3)}
    assert len(sampled) > 1, "every answer has the same seed"
    assert answer(do_sample=True, temperature=9.0, top_k=1, max_gen_toks=20) == whole
    assert answer(max_gen_toks=60, until=["."]) != whole, "the end of a long prompt is read"
    with pytest.raises(ValueError, match="generation_kwargs has num_beams"):
        answer(num_beams=4)
    with pytest.raises(ValueError, match="generation_kwargs has typical_p: known are until"):
        answer(typical_p=0.5)
    with pytest.raises(ValueError, match="max_gen_toks is 80, which leaves no room"):
        answer(max_gen_toks=80)


def test_dialogs_become_the_prompts_of_the_chat_format(model: LlamaLM) -> None:
    """A failure means that chat models are asked in another form than they were trained in."""
    llama, turns = model.llama, ["Hello", "Hi.", "What does the cow say?"]
    roles = ["user", "assistant"] * 2
    dialog = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    usual = llama.chat
    for name in (None, "llama3", "alpaca", "vicuna", "chatml"):
        llama.chat = choose_chat(name, {}, llama.tokenizer) if name else usual
        text = model.apply_chat_template(dialog)  # type: ignore[arg-type]
        ids = llama.chat.prompt(llama.tokenizer, dialog)  # type: ignore[arg-type]
        assert model.tok_encode(text) == ids, name
        begun = model.apply_chat_template(dialog[:2], add_generation_prompt=False)  # type: ignore
        assert begun.endswith("Hi."), begun
        assert model.chat_template(True) == (llama.chat.template or llama.chat.name)
    llama.chat = usual
    twice = [dialog[0], dialog[2]]  # which the format can't hold
    assert "Hello\n\nWhat" in model.apply_chat_template(twice)  # type: ignore[arg-type]
    assert model.chat_template(False) is None


def test_a_continuation_that_cannot_be_scored_is_refused(model: LlamaLM) -> None:
    """A failure means that a score stands for tokens that weren't read."""
    for ids in ([], [7] * (MAX_LENGTH + 1)):
        with pytest.raises(ValueError, match=f"has {len(ids)} tokens: expected 1 to max_seq_len"):
            model._loglikelihood_tokens([(("", ""), [1], ids)])


@pytest.mark.soak
def test_two_machines_of_which_one_is_lost(tmp_path: Path) -> None:
    """A failure means that other answers are kept than one process gives, or that an evaluation
    waits forever for a machine without power."""
    tasks, kwargs = ["animals", "animals_written"], {"max_gen_toks": 200, "until": ["@@"]}
    flags = ("--tasks", ",".join(tasks), "--include_path", str(TASKS), "--device", "cpu")
    flags += ("--gen_kwargs", 'max_gen_toks=200,until=["@@"]', "--dtype", "float32")
    flags += ("--use_cache", str(tmp_path / "two"))
    with two_machines("-m", "llama.evaluate", *flags) as machines:
        wait_until(lambda: any(f.stat().st_size > 20_000 for f in tmp_path.glob("two*")), 120)
        lose_one_machine(*machines)
    options = {"gen_kwargs": kwargs, "use_cache": str(tmp_path / "one")}
    evaluated(LlamaLM(dtype="float32", device="cpu"), tasks, None, **options)
    one, two = (dict(SqliteDict(str(next(tmp_path.glob(f"{n}*"))))) for n in ("one", "two"))
    assert two and all(difference(value, one[key]) < 1e-4 for key, value in two.items())


@pytest.mark.soak
def test_smollm2_gets_what_hf_gets(tmp_path: Path) -> None:
    """A failure means that a model with a tokenizer and a template of its own is read otherwise."""
    path = os.environ.get("LLAMA_SMOLLM2")
    if not path:
        pytest.skip("LLAMA_SMOLLM2 is not set")
    convert(path, str(tmp_path / "hf"), "hf", dtype="float32")
    build = {"dtype": "float32", "device": "cpu", "max_seq_len": 512, "batch_size": 3}
    model = LlamaLM(path, **build)
    for chat in (False, True):
        options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
        reference = evaluated_all(theirs(tmp_path / "hf", max_length=512), 5, **options)
        check_equal(evaluated_all(model, 5, **options), reference)
