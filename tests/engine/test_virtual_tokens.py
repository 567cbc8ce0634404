"""Prompt tuning, P-tuning and prefix tuning: the results are those of PEFT's own model."""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import make_hf, save_hf, write_adapter
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft_files import write_virtual_tokens
from transformers import LlamaForSequenceClassification

from llama import Llama
from llama.engine.sequence import Sequence
from llama.errors import PromptTooLong
from llama.sampling import SamplingParams

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "other": lambda: PromptTuningConfig(num_virtual_tokens=7, **CAUSAL),
    "embedded": lambda: PromptTuningConfig(
        num_virtual_tokens=3, modules_to_save=["embed_tokens"], **CAUSAL
    ),
    "mlp": lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **CAUSAL),
    "lstm": lambda: PromptEncoderConfig(
        num_virtual_tokens=3,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        **CAUSAL,
    ),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=6, **CAUSAL),
    "projected": lambda: PrefixTuningConfig(
        num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=16, **CAUSAL
    ),
    "saved": lambda: PrefixTuningConfig(
        num_virtual_tokens=4, modules_to_save=["lm_head", "norm"], **CAUSAL
    ),
}
PROMPTS = [[1, 400, 27, 300], [1, 5], [9], [1, 400, 27, 300, 8, 12, 60, 700, 33, 2]]
LENGTH = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("virtual")


@pytest.fixture(scope="module")
def references(directory: Path) -> dict[str | None, Any]:
    """PEFT's models by their adapters' names, and transformers' without one."""
    save_hf(make_hf(), directory / "base")
    models: dict[str | None, Any] = {None: make_hf()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, (name, config) in enumerate(CONFIGS.items()):
            models[name] = write_virtual_tokens(make_hf(), directory / name, config(), seed)
        lora = {"target_modules": "all-linear"}
        models["lora"] = write_adapter(make_hf(), directory / "lora", lora)
    return models


def build(directory: Path, names: Any, **options: Any) -> Llama:
    options = {"max_seq_len": 48, "max_batch_size": 3, "dtype": torch.float32} | options
    llama = Llama.build(directory / "base", device="cpu", **options)
    for name in filter(None, names):
        llama.load_adapter(name, directory / name)
    return llama


@pytest.fixture
def llama(directory: Path, references: dict[str | None, Any]) -> Iterator[Llama]:
    yield build(directory, references)


def greedy(model: Any, prompt: list[int], penalty: float = 1.0) -> tuple[list[int], list[float]]:
    """PEFT's greedy continuation, and the log-probabilities of all tokens but the first."""
    ids, scores = list(prompt), []
    with torch.inference_mode():
        for _ in range(LENGTH):
            logits = model(torch.tensor([ids])).logits[0, -1]
            seen = torch.tensor(ids).unique()
            some = logits[seen]
            logits[seen] = torch.where(some < 0, some * penalty, some / penalty)
            ids.append(int(logits.argmax()))
        # Of prompt tuning the logits of the virtual tokens stand before the prompt's.
        logprobs = model(torch.tensor([ids])).logits[0, -len(ids) :].log_softmax(-1)
    scores = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    return ids[len(prompt) :], scores


def run(llama: Llama, asked: list[tuple[str | None, list[int]]], **options: Any) -> list[Sequence]:
    """All in one batch, each with its own adapter."""
    options = {"temperature": 0, "max_gen_len": LENGTH, "ignore_eos": True} | options
    sequences = []
    for adapter, prompt in asked:
        params = SamplingParams(adapter=adapter, **options)
        sequences += llama.tasks.generate([prompt], params, "ids")
    llama.engine.submit(sequences)
    while llama.engine.n_running or llama.engine.n_waiting:
        llama.engine.step()
    return sequences


@pytest.mark.parametrize("prefill_tokens", [3, 512])
def test_a_ragged_batch_of_adapters_has_pefts_results(
    prefill_tokens: int, llama: Llama, references: dict[str | None, Any]
) -> None:
    """Positions, rotations, embeddings or adapters of neighbours that are wrong change scores.

    Pieces of three tokens end among the virtual ones.
    """
    llama.model.prefill_tokens = prefill_tokens
    asked = [(name, prompt) for prompt in PROMPTS for name in references]
    sequences = run(llama, asked, logprobs=True, echo=True)
    for (name, prompt), sequence in zip(asked, sequences, strict=True):
        tokens, scores = greedy(references[name], prompt)
        assert sequence.tokens == tokens, name
        assert sequence.prompt == prompt
        found = [*sequence.prompt_logprobs, *sequence.logprobs]
        assert found[0] == 0 and len(found) == len(prompt) + LENGTH
        assert found[1:] == pytest.approx(scores, abs=1e-4), name


def test_the_same_prompt_is_read_once_for_each_adapter(
    directory: Path, references: dict[str | None, Any]
) -> None:
    """A prefix that crossed adapters would give another one's answer; none reused costs time."""
    llama, prompt = build(directory, references, max_batch_size=6), PROMPTS[-1]
    first = {name: run(llama, [(name, prompt)])[0] for name in ("prompt", "other", "prefix")}
    assert [each.n_reused for each in first.values()] == [0, 0, 0]
    for name, before in first.items():
        again = run(llama, [(name, prompt), (name, [*prompt[:-1], 7])])
        assert again[0].tokens == before.tokens
        assert [each.n_reused for each in again] == [len(prompt) - 1] * 2
    llama.engine.forget()
    for name, before in first.items():
        assert run(llama, [(name, prompt)])[0].tokens == before.tokens


def test_drafts_penalties_and_processors_see_the_prompt_alone(
    llama: Llama, references: dict[str | None, Any]
) -> None:
    """Virtual tokens that counted would be penalised, drafted, or shown to a processor."""
    seen: list[list[int]] = []

    def processor(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return logits

    prompt = [1, 400, 27, 300, 1, 400, 27]
    for name in ("prompt", "prefix"):
        tokens, _ = greedy(references[name], prompt)
        drafted = run(llama, [(name, prompt)], prompt_lookup_num_tokens=4)[0]
        assert drafted.tokens == tokens
        penalised = run(llama, [(name, prompt)], repetition_penalty=1.7)[0]
        assert penalised.tokens == greedy(references[name], prompt, 1.7)[0]
        seen.clear()
        assert run(llama, [(name, prompt)], logits_processor=processor)[0].tokens == tokens
        assert seen == [[*prompt, *tokens[:i]] for i in range(LENGTH)]
        least = run(llama, [(name, prompt)], min_tokens=3, stop_token_ids=set(range(767)))[0]
        assert least.tokens == [767] * 3
    text = llama.text_completion(["Once"], 0, max_gen_len=4, echo=True, adapter="prompt")[0]
    assert text["generation"].startswith("Once")


def test_virtual_tokens_take_room(directory: Path, llama: Llama) -> None:
    """Uncounted they would write beyond the cache."""
    small = build(directory, ["prompt", "prefix"], max_seq_len=16)
    for name, n_virtual in (("prompt", 5), ("prefix", 6)):
        room = 16 - n_virtual
        with pytest.raises(PromptTooLong, match=f"behind its adapter's {n_virtual} virtual ones"):
            small.generate([[5] * (room + 1)], 1, adapter=name)
        assert small.generate([[5] * room], 9, adapter=name)[0] == [[]]
        one = run(small, [(name, [5] * (room - 3))], max_gen_len=None)[0]
        assert len(one.tokens) == 3 and one.finish_reason == "length"
    with pytest.raises(
        ValueError, match=r"has 6 virtual tokens, which leave no room .* larger max"
    ):
        build(directory, ["prefix"], max_seq_len=6)


def test_embeddings_are_those_of_the_text_behind_virtual_tokens(
    llama: Llama, references: dict[str | None, Any]
) -> None:
    """A mean over virtual tokens would make texts alike."""
    ids = llama.tokenizer.encode("Once upon", bos=True, eos=False)
    for prefill_tokens in (3, 512):
        llama.model.prefill_tokens = prefill_tokens
        for name in ("prompt", "prefix"):
            with torch.inference_mode():
                out = references[name](torch.tensor([ids]), output_hidden_states=True)
            hidden = out.hidden_states[-1][0, -len(ids) :]
            for pooling, expected in (("mean", hidden.mean(0)), ("last", hidden[-1])):
                found = llama.embed(["Once upon"], pooling, adapter=name)[0]
                assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("classifies", [False, True])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_classifiers_have_pefts_logits(kind: Any, classifies: bool, tmp_path: Path) -> None:
    """The adapter brings its head, for a base that writes text and for one that classifies."""
    options = {"num_labels": 3, "pad_token_id": 0}
    reference = make_hf(LlamaForSequenceClassification, **options)
    save_hf(reference if classifies else make_hf(), tmp_path / "base")
    if not classifies:
        reference.model.load_state_dict(make_hf().model.state_dict())
    more = {"encoder_hidden_size": 16} if kind is PromptEncoderConfig else {}
    config = kind(num_virtual_tokens=4, task_type="SEQ_CLS", **more)
    model = write_virtual_tokens(reference, tmp_path / "classifier", config)
    llama = build(tmp_path, ["classifier"])
    texts = ["Once upon a time", "The", "A dog ran home"]
    for text, found in zip(texts, llama.classify(texts, adapter="classifier"), strict=True):
        ids = llama.tokenizer.encode(text, bos=True, eos=False)
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0]
        assert found["logits"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert found["label"] == f"LABEL_{expected.argmax()}"
    if not classifies:
        with pytest.raises(ValueError, match="'classifier' writes no text: use classify"):
            llama.generate([[1]], 1, adapter="classifier")


def test_an_int8_cache_holds_a_prefix(directory: Path, references: dict[str | None, Any]) -> None:
    """Keys written past the scales would be noise."""
    llama = build(directory, ["prefix"], kv_cache_dtype="int8")
    [sequence] = run(llama, [("prefix", PROMPTS[0])], logprobs=True, max_gen_len=1)
    _, scores = greedy(references["prefix"], PROMPTS[0])
    assert math.isclose(sequence.logprobs[0], scores[len(PROMPTS[0]) - 1], abs_tol=0.1)
