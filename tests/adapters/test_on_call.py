"""Adapters that calls choose by name: in one batch each sequence's tokens are PEFT's own."""

import gc
import json
import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import make_hf, save_hf, write_adapter
from json_tokenizers import byte_level
from processes import forked, script
from safetensors.torch import load_file, save_file

from llama import Llama, Transformer, parallel
from llama.adapters import Adapter, LowRank, Replaced
from llama.adapters.changes import VirtualTokens
from llama.engine.sequence import Sequence
from llama.sampling import SamplingParams

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"], "lora_alpha": 6},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 2, "lora_alpha": 16},
}
PROMPTS = [[1, 20, 300], [1, *range(40, 80)], [1], [1, *range(500, 517)], [1, 20, 300, 7]]
CHOICES = ["all", None, "some", "all", None]
REPEATED = [1, *[30, 40, 50, 60, 70] * 4]
N_NEW = 16


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_hf(make_hf(), folder / "base")
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str | None, Any]:
    """PEFT's models by their adapters, and transformers' without; writes the adapters."""
    found: dict[str | None, Any] = {None: make_hf()}
    for seed, (name, options) in enumerate(OPTIONS.items()):
        how = {"seed": seed, "save_embedding_layers": False}
        found[name] = write_adapter(make_hf(), folder / name, options, **how)
    for model in found.values():
        model.generation_config.eos_token_id = None
    return found


def make_llama(folder: Path, **how: Any) -> Llama:
    sizes = {"max_seq_len": 128, "max_batch_size": 5, "dtype": torch.float32, "device": "cpu"}
    llama = Llama.build(folder / "base", **{**sizes, **how})
    llama.tokenizer.stop_ids = frozenset()
    return llama


@pytest.fixture
def llama(folder: Path, references: dict[str | None, Any]) -> Llama:
    llama = make_llama(folder)
    for name in OPTIONS:
        llama.load_adapter(name, folder / name)
    return llama


def continued(model: Any, prompt: list[int], n: int = N_NEW) -> list[int]:
    """The ids that transformers or PEFT append greedily."""
    ids = torch.tensor([prompt])
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip


def make_sequences(
    llama: Llama, prompts: list[list[int]] = PROMPTS, **settings: Any
) -> list[Sequence]:
    """One of each prompt and choice."""
    made = []
    for prompt, name in zip(prompts, CHOICES, strict=True):
        params = SamplingParams(
            **{"temperature": 0, "max_gen_len": N_NEW, **settings}, adapter=name
        )
        made += llama.tasks.generate([prompt], params, "ids")
    return made


def run(llama: Llama, sequences: list[Sequence]) -> None:
    llama.engine.submit(sequences)
    while llama.engine.n_running or llama.engine.n_waiting:
        llama.engine.step()


@pytest.mark.parametrize("way", ["whole", "pieces", "drafts", "few slots"])
def test_one_batch_has_several_adapters_and_none(
    way: str,
    llama: Llama,
    folder: Path,
    references: dict[str | None, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that get another sequence's adapter, or none, wherever a pass has them."""
    if way == "pieces":
        monkeypatch.setattr(llama.model, "prefill_tokens", 7)
        llama.engine.prefill_beside_decoding = 7
    if way == "few slots":
        loaded = llama.adapters
        llama = make_llama(folder, max_batch_size=2)
        for name in loaded:
            llama.adapters.add(loaded[name])
    prompts = [*PROMPTS[:3], REPEATED, PROMPTS[4]]
    sequences = make_sequences(llama, prompts, prompt_lookup_num_tokens=3 * (way == "drafts"))
    if way == "drafts":  # random networks repeat nothing: all drafts are right
        rest = {s: continued(references[s.params.adapter], s.prompt) for s in sequences}
        monkeypatch.setattr(Sequence, "draft", lambda self, _: rest[self][len(self.tokens) :][:3])
    run(llama, sequences)
    for sequence, name in zip(sequences, CHOICES, strict=True):
        assert sequence.tokens == continued(references[name], sequence.prompt)
    n_passes = llama.engine.counts.passes
    if way == "whole":
        assert n_passes == N_NEW, "the adapters had passes of their own"
    if way == "drafts":
        assert n_passes == 1 + math.ceil((N_NEW - 1) / 4), "drafts weren't taken"


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_those_of_peft_and_of_the_merged_model(
    name: str, llama: Llama, folder: Path, references: dict[str | None, Any]
) -> None:
    """A change that is left out or scaled wrongly, though the most probable token stays."""
    prompt = PROMPTS[1]
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        logprobs = references[name](input_ids=ids).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    merged = make_llama(folder, adapter=folder / name)
    how: Any = {"max_gen_len": N_NEW, "temperature": 0, "logprobs": True, "echo": True}
    ids_of_merged, scores_of_merged = merged.generate([prompt], **how)
    ids_on_call, scores = llama.generate([prompt], **how, adapter=name)
    assert ids_on_call == ids_of_merged
    assert scores and scores_of_merged
    assert scores[0][1 : len(prompt)] == pytest.approx(expected, abs=2e-4)
    assert scores[0] == pytest.approx(scores_of_merged[0], abs=2e-4)


@pytest.mark.parametrize("how", [{"quantize": "int8"}, {"quantize": "int4", "group_size": 32}])
def test_a_quantised_base_keeps_its_weights(
    how: dict[str, Any], llama: Llama, folder: Path, references: dict[str | None, Any]
) -> None:
    """Its kernels hold several layers' weights; with an adapter they give W x + B A x."""
    quantized = make_llama(folder, **how)
    for name in OPTIONS:
        quantized.load_adapter(name, folder / name)
    exact = make_llama(folder).model  # of the same weights, widened, with the adapter's added
    with torch.inference_mode():
        every = torch.arange(exact.params.vocab_size)
        exact.tok_embeddings.weight.copy_(quantized.model.tok_embeddings(every))
        for path, change in quantized.adapters["all"].changes.items():
            assert isinstance(change, LowRank)
            added = change.scale * change.b @ change.a
            layer, weight = quantized.model.get_submodule(path), exact.get_submodule(path).weight
            if path == "tok_embeddings":
                weight += added.T
            else:
                weight.copy_(layer.plain_weight() + added)
    tokens = torch.tensor(PROMPTS[1])
    logprobs = exact(tokens[None], 0)[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, tokens[1:, None])[:, 0]
    scored: Any = {"temperature": 0, "logprobs": True, "echo": True, "adapter": "all"}
    _, scores = quantized.generate([tokens.tolist()], 0, **scored)
    assert scores
    error = (torch.tensor(scores[0][1:]) - expected).abs().max() / expected.abs().max()
    assert error < 0.03  # kernels round their inputs too
    sequences = make_sequences(quantized)
    run(quantized, sequences)
    quantized.reset_cache()
    if how["quantize"] == "int8":  # whose products don't depend on other tokens
        for sequence in sequences:
            name = sequence.params.adapter
            alone, _ = quantized.generate([sequence.prompt], N_NEW, temperature=0, adapter=name)
            assert alone == [sequence.tokens]


def hooked(model: Transformer) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "adapted", None)]


def test_passes_without_adapters_are_what_they_were(
    llama: Llama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that outlives its pass, also one that fails, changes everyone's results."""
    tokens = torch.tensor(PROMPTS[1])[None]
    before = make_llama(folder).model(tokens, 0)
    seen: list[list[str]] = []
    norm = llama.model.norm.forward

    def failing(x: torch.Tensor) -> torch.Tensor:
        seen.append(hooked(llama.model))
        if len(seen) == 3:
            raise RuntimeError("stopped")
        return norm(x)

    monkeypatch.setattr(llama.model.norm, "forward", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        llama.generate([PROMPTS[0]], 9, temperature=0, adapter="some")
    assert len(seen[0]) == 2 * 3
    assert not hooked(llama.model)
    llama.generate([PROMPTS[0]], 9, temperature=0)
    assert not seen[-1]
    assert torch.equal(llama.model(tokens, 0), before)


def test_prefixes_stay_with_their_adapter(
    llama: Llama, folder: Path, references: dict[str | None, Any]
) -> None:
    """Keys and values of one network reused by another: of none, another adapter, another version
    or another scale."""
    prompt = PROMPTS[1]

    def ask(name: str | None) -> tuple[list[int], int]:
        params = SamplingParams(0, max_gen_len=4, adapter=name)
        [sequence] = llama.tasks.generate([prompt], params, "ids")
        run(llama, [sequence])
        return sequence.tokens, sequence.n_reused

    for name in (None, "all", "some"):
        expected = continued(references[name], prompt, 4)
        assert ask(name) == (expected, 0)
        assert ask(name) == (expected, len(prompt) - 1)
    old = ask("all")[0]
    llama.load_adapter("all", folder / "some")  # another version of it
    assert ask("all") == (continued(references["some"], prompt, 4), 0)
    llama.load_adapter("all", folder / "all", scale=0.5)
    assert ask("all")[1] == 0
    llama.unload_adapter("all")
    llama.load_adapter("all", folder / "all")
    assert ask("all") == (old, 0)
    # Nor does one wait for another's prompt.
    n_passes = llama.engine.counts.passes
    sequences = make_sequences(llama)
    for sequence in sequences:
        sequence.prompt = [1, *range(300, 400)]
    llama.reset_cache()
    run(llama, sequences)
    assert [sequence.n_reused for sequence in sequences] == [0, 0, 0, 100, 100]
    assert llama.engine.counts.passes == n_passes + N_NEW + 1


def test_scales(llama: Llama, folder: Path, references: dict[str | None, Any]) -> None:
    """A scale that is ignored, or one that replaces the adapter's own."""
    llama.load_adapter("half", folder / "all", scale=0.5)
    llama.load_adapter("off", folder / "all", scale=0)
    model = write_adapter(make_hf(), folder / "again", OPTIONS["all"], seed=0)
    for module in model.modules():
        if hasattr(module, "lora_A"):  # scale_layer leaves embeddings out
            module.scaling["default"] *= 0.5
    prompts, n = PROMPTS[:2], 8
    found, _ = llama.generate(prompts, n, temperature=0, adapter="half")
    assert found == [continued(model, prompt, n) for prompt in prompts]
    assert found != llama.generate(prompts, n, temperature=0, adapter="all")[0]
    off, plain = (llama.generate(prompts, n, 0, adapter=name)[0] for name in ("off", None))
    assert off == plain == [continued(references[None], prompt, n) for prompt in prompts]


def test_what_runs_keeps_its_adapter(
    llama: Llama, folder: Path, references: dict[str | None, Any]
) -> None:
    """Loading and unloading under a stream: it goes on as it began, and frees the adapter."""
    prompt = llama.tokenizer.decode(PROMPTS[3])
    expected = llama.text_completion([prompt], 0, max_gen_len=12, adapter="all")[0]["generation"]
    for change in (
        lambda: llama.load_adapter("all", folder / "some"),
        lambda: llama.unload_adapter("all"),
    ):
        llama.load_adapter("all", folder / "all")
        held = weakref.ref(llama.adapters["all"])
        llama.generate([PROMPTS[0]], 2, 0, adapter="all", repetition_penalty=1.3)
        stream = llama.text_completion_stream(prompt, 0, max_gen_len=12, adapter="all")
        begin = next(stream)
        change()
        assert begin + "".join(stream) == expected
        del stream
        gc.collect()
        assert held() is None, "its memory is still taken"
    with pytest.raises(ValueError, match="no adapter 'all': loaded are 'some'"):
        llama.generate([[1]], 2, adapter="all")
    with pytest.raises(ValueError, match="no adapter 'all'"):
        llama.unload_adapter("all")
    assert list(llama.adapters) == ["some"]


def test_every_task_takes_an_adapter(llama: Llama, folder: Path) -> None:
    """One that forgets the name on its way, and answers with the base."""
    merged = make_llama(folder, adapter=folder / "all")
    dialog: Any = [{"role": "user", "content": "What does the cow say?"}]
    calls: list[Callable[..., Any]] = [
        lambda llama, **how: llama.generate(PROMPTS, 6, 0, **how),
        lambda llama, **how: llama.text_completion(["The cow", "A"], 0, max_gen_len=6, **how),
        lambda llama, **how: llama.chat_completion([dialog], 0, max_gen_len=6, **how),
        lambda llama, **how: llama.text_infilling(["a"], ["b"], 0, max_gen_len=6, **how),
        lambda llama, **how: list(llama.text_completion_stream("A", 0, max_gen_len=6, **how)),
        lambda llama, **how: list(llama.chat_completion_stream(dialog, 0, max_gen_len=6, **how)),
        lambda llama, **how: list(llama.text_infilling_stream("a", "b", 0, max_gen_len=6, **how)),
    ]
    for call in calls:
        assert call(llama, adapter="all") == call(merged) != call(llama)
    for pooling in ("mean", "last"):
        vectors = llama.embed(["The cow", "A"], pooling, adapter="all")
        torch.testing.assert_close(
            vectors, merged.embed(["The cow", "A"], pooling), atol=2e-4, rtol=0
        )
        assert (vectors - llama.embed(["The cow", "A"], pooling)).abs().max() > 0.1


def test_vectors_beside_texts(llama: Llama) -> None:
    """The output layer sees other rows than the layers where some outputs are only pooled."""
    before = llama.tasks.read([PROMPTS[1]], "mean", "all")
    run(llama, before)
    weight = llama.model.norm.weight.flip(0)
    changes = {**llama.adapters["all"].changes, "norm": Replaced(weight, llama.model.norm.eps)}
    llama.adapters.add(Adapter("all", changes))

    def make() -> list[Sequence]:
        read = [llama.tasks.read([PROMPTS[i]], "mean", name) for i, name in ((1, "all"), (2, None))]
        return [*read[0], *make_sequences(llama, max_gen_len=3)[2:], *read[1]]

    together, alone = make(), make()
    n_passes = llama.engine.counts.passes
    run(llama, together)
    assert llama.engine.counts.passes == n_passes + 3
    llama.reset_cache()
    for sequence in alone:
        run(llama, [sequence])
        llama.reset_cache()
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        if one.pooled is not None and other.pooled is not None:
            torch.testing.assert_close(one.pooled, other.pooled, atol=1e-4, rtol=1e-4)
    assert before[0].pooled is not None and together[0].pooled is not None
    renormed = before[0].pooled / llama.model.norm.weight * weight
    torch.testing.assert_close(together[0].pooled, renormed, atol=1e-4, rtol=1e-4)


def test_an_adapters_classifier(llama: Llama) -> None:
    """A model that writes text classifies with the head that an adapter brings."""
    with pytest.raises(ValueError, match="no labels, which classifying needs"):
        llama.classify(["a"])
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(3, llama.model.params.dim, generator=generator)
    changes = llama.adapters["some"].changes
    llama.adapters.add(Adapter("judge", changes, head=head, labels=["a", "b", "c"]))
    texts = ["The cow", "A", "Once upon a time"]
    hidden = llama.embed(texts, "last", adapter="judge")
    assert llama.classify([], adapter="judge") == []
    for found, logits in zip(llama.classify(texts, adapter="judge"), hidden @ head.T, strict=True):
        assert found["logits"] == pytest.approx(logits.tolist(), abs=1e-4)
        assert found["label"] == "abc"[int(logits.argmax())]
        assert found["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)


def test_mistakes_are_named(llama: Llama, tmp_path: Path) -> None:
    """A failure means that a caller learns too late, or not at all, what was wrong."""
    with pytest.raises(ValueError, match=r"no adapter 'x': loaded are 'all', 'some'"):
        llama.text_completion(["a"], adapter="x")
    with pytest.raises(ValueError, match="no adapter 'x'"):
        llama.embed(["a"], adapter="x")
    with pytest.raises(TypeError, match="adapter is 3"):
        SamplingParams(adapter=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name is ''"):
        llama.load_adapter("", tmp_path)
    with pytest.raises(ValueError, match="no adapter None"):
        llama.unload_adapter(None)  # type: ignore[arg-type]
    for scale in ("1", True, float("nan"), 10**400, 1e39):
        with pytest.raises(TypeError, match="scale is"):
            llama.load_adapter("x", tmp_path, scale)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        llama.load_adapter("x", tmp_path)
    assert list(llama.adapters) == ["all", "some"]


def test_another_tokenizer_is_told(
    llama: Llama, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts in words that the model doesn't have would be read by its own, without a word."""
    for name, is_other in (("same", False), ("other", True)):
        directory = tmp_path / name
        directory.mkdir()
        for file in (folder / "some").iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        if is_other:
            (directory / "tokenizer.json").write_text(json.dumps(byte_level()))
        else:
            tokenizer = folder / "base" / "tokenizer.model"
            (directory / tokenizer.name).write_bytes(tokenizer.read_bytes())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            llama.load_adapter(name, directory)
        assert ("another tokenizer" in caplog.text) is is_other


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_an_unreadable_tokenizer_is_ignored(
    llama: Llama, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter that works without its tokenizer can't be loaded for its sake."""
    directory = copied(folder / "some", tmp_path / "unreadable")
    (directory / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
    with caplog.at_level(logging.WARNING):
        llama.load_adapter("unreadable", directory)
    assert "is ignored: it can't be read" in caplog.text


def test_numbers_beyond_the_dtype_are_refused(
    folder: Path, references: dict[str | None, Any], tmp_path: Path
) -> None:
    """An adapter that is finite in its file only ends its neighbours in a batch with it."""
    path = copied(folder / "some", tmp_path / "large") / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: t.fill_(1e6) if "lora_B" in k else t for k, t in tensors.items()}, path)
    make_llama(folder).load_adapter("large", path.parent)
    with pytest.raises(ValueError, match=r"an infinity or a NaN as torch\.float16"):
        make_llama(folder, dtype=torch.float16).load_adapter("large", path.parent)


def test_a_pass_ahead_keeps_no_adapter(llama: Llama) -> None:
    """The pass that was begun before a stop token was known would hold memory until the next."""
    llama.engine.runs_ahead = True
    prompt, how = PROMPTS[0], {"temperature": 0, "adapter": "all"}
    [tokens] = llama.generate([prompt], 8, **how)[0]
    held = weakref.ref(llama.adapters["all"])
    llama.generate([prompt], 8, **how, stop_token=tokens[2])
    llama.unload_adapter("all")
    gc.collect()
    assert held() is None


def test_one_version_classifies(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head on hidden states of an adapter that took its name between two look-ups."""
    head = torch.ones(2, llama.model.params.dim)

    def load(name: str) -> None:
        changes = llama.adapters[name].changes
        llama.adapters.add(Adapter("judge", changes, head=head, labels=["a", "b"]))

    load("some")
    expected, read = llama.classify(["The cow"], adapter="judge"), llama.tasks.read

    def replacing(*given: Any) -> list[Sequence]:
        load("all")
        return read(*given)

    monkeypatch.setattr(llama.tasks, "read", replacing)
    assert llama.classify(["The cow"], adapter="judge") == expected


def test_virtual_tokens_are_no_prompts(llama: Llama) -> None:
    """A count of prompts' tokens that depends on the adapter."""
    rows = torch.zeros(5, llama.model.params.dim)
    changes = {"tok_embeddings": VirtualTokens(rows, 768)}
    llama.adapters.add(Adapter("soft", changes, range(768, 773)))
    llama.generate([[1, 9, 8]], 1, adapter="soft")
    assert llama.engine.counts.prompt_tokens == 3


def test_another_thread_cannot_load_on_ranks(
    llama: Llama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading compares weights on all ranks, whose sums then mix with a pass's."""
    llama.generate([[1]], 1)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    llama._lock.check_thread()
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match="make all calls from one thread"),
    ):
        pool.submit(llama.load_adapter, "x", folder / "some").result()


RANKS = """
import json, os, sys, torch
from pathlib import Path
from llama import Llama
from llama.sampling import SamplingParams

out, folder = Path(sys.argv[1]), Path(sys.argv[2])
prompts, choices = json.loads(sys.argv[3])
llama = Llama.build(folder / "base", max_seq_len=128, max_batch_size=5, dtype=torch.float32,
                    device="cpu")
llama.tokenizer.stop_ids = frozenset()
for name in ("all", "some"):
    llama.load_adapter(name, folder / name)
sequences = []
for prompt, name in zip(prompts, choices):
    params = SamplingParams(0, max_gen_len=16, adapter=name)
    sequences += llama.tasks.generate([prompt], params, "ids")
llama.engine.submit(sequences)
while llama.engine.n_running or llama.engine.n_waiting:
    llama.engine.step()
Path(f"{out}{os.environ['RANK']}").write_text(json.dumps([s.tokens for s in sequences]))
"""


@pytest.mark.slow
def test_ranks_share_an_adapter(
    folder: Path, references: dict[str | None, Any], tmp_path: Path
) -> None:
    """Parts that don't belong to a rank's weights; four ranks copy the two key/value heads."""
    n, out = 4, tmp_path / "rank"
    task = json.dumps([PROMPTS, CHOICES])
    path = script(tmp_path, RANKS)
    done = forked(path, str(out), str(folder), task, n=n)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = zip(PROMPTS, CHOICES, strict=True)
    expected = [continued(references[name], prompt) for prompt, name in pairs]
    for rank in range(n):
        assert json.loads(Path(f"{out}{rank}").read_text()) == expected
