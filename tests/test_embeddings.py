"""Vectors and classes of texts: equal to transformers', alone and in company."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import make_hf, save_hf
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from llama import Llama
from llama.checkpoint.save import save
from llama.generation import TINY
from llama.model import Transformer

PREFILL_CHUNK = Transformer.prefill_tokens
SEQ_LEN = 2 * PREFILL_CHUNK + 100
TEXTS = [
    "Tom has a kite.",
    "a",
    "The dog and the cat. " * 12,
    "",
    "One more!",
    "语 é 😀",
    "so it is",
]
LONG = "Tom and the big dog run to the park. " * 96


def write(directory: Path, kind: type = LlamaForCausalLM, **config: Any) -> Any:
    """Save a small random model with room for long texts; gives it."""
    config = {"max_position_embeddings": 2048, "pad_token_id": 0, **config}
    return save_hf(make_hf(kind, **config), directory)


def build(directory: Path, **more: Any) -> Llama:
    settings = {"max_seq_len": SEQ_LEN, "max_batch_size": 3, "dtype": torch.float32, **more}
    return Llama.build(directory, device="cpu", **settings)


def ids(llama: Llama, text: str) -> torch.Tensor:
    return torch.tensor([llama.tokenizer.encode(text, bos=True, eos=False)])


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, LlamaModel]:
    path = tmp_path_factory.mktemp("writer")
    reference = write(path)
    return build(path), reference.model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Any]:
    path = tmp_path_factory.mktemp("classifier")
    names = {"id2label": {0: "bad", 1: "so so", 2: "good"}}
    reference = write(path, LlamaForSequenceClassification, num_labels=3, **names)
    return build(path), reference


@torch.inference_mode()
def hidden(reference: LlamaModel, tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    states = reference(tokens).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[-1]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_transformers_alone_and_in_company(
    pooling: str, writer: tuple[Llama, LlamaModel]
) -> None:
    llama, reference = writer
    texts = [*TEXTS, LONG]  # more than there are rows, one of them longer than a pass takes
    lengths = [ids(llama, text).shape[1] for text in texts]
    assert len(texts) > 2 * llama.model.params.max_batch_size and lengths[-1] > 2 * PREFILL_CHUNK
    expected = torch.stack([hidden(reference, ids(llama, text), pooling) for text in texts])
    together = llama.embed(texts, pooling)
    assert together.shape == (len(texts), 64) and together.dtype == torch.float32
    assert (together - expected).abs().max() < 1e-4
    alone = torch.cat([llama.embed([text], pooling=pooling) for text in texts])
    assert (alone - expected).abs().max() < 1e-4


@pytest.mark.parametrize("length", [PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_where_passes_are_cut_no_token_is_lost(
    length: int, pooling: str, writer: tuple[Llama, LlamaModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, reference = writer
    tokens = torch.randint(3, 768, (1, length), generator=torch.Generator().manual_seed(length))
    found = llama.embed([tokens[0].tolist()] * 2, pooling)
    expected = hidden(reference, tokens, pooling)
    assert (found - expected).abs().max() < 1e-4


def test_the_mean_is_the_default_and_what_was_read_leaves_no_trace(
    writer: tuple[Llama, LlamaModel],
) -> None:
    llama, _ = writer
    before = llama.generate([[1, 20, 300]], 10, temperature=0)
    first = llama.embed(TEXTS)
    assert torch.equal(first, llama.embed(TEXTS, "mean"))
    llama.embed([LONG])
    assert torch.equal(first, llama.embed(TEXTS))
    assert llama.generate([[1, 20, 300]], 10, temperature=0) == before


def test_nothing_gives_nothing(writer: tuple[Llama, Any], classifier: tuple[Llama, Any]) -> None:
    assert writer[0].embed([]).shape == (0, 64)
    assert classifier[0].classify([]) == []


LABELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "named": (
        {"num_labels": 3, "id2label": {0: "bad", 1: "so so", 2: "good"}},
        ["bad", "so so", "good"],
    ),
    "two": ({"num_labels": 2}, ["LABEL_0", "LABEL_1"]),
    "one": ({"num_labels": 1}, ["LABEL_0"]),
    "tied": ({"num_labels": 2, "tie_word_embeddings": True}, ["LABEL_0", "LABEL_1"]),
}


@pytest.mark.parametrize("name", LABELS)
def test_classes_are_those_of_transformers_alone_and_in_company(name: str, tmp_path: Path) -> None:
    config, labels = LABELS[name]
    reference = write(tmp_path, LlamaForSequenceClassification, **config)
    llama = build(tmp_path)
    texts = [*TEXTS, LONG]
    together = llama.classify(texts)
    for text, found in zip(texts, together, strict=True):
        with torch.inference_mode():
            logits = reference(ids(llama, text)).logits[0]
        scores = logits.softmax(0) if len(labels) > 1 else logits.sigmoid()
        assert found["logits"] == pytest.approx(logits.tolist(), abs=1e-4)
        assert found["label"] == labels[int(logits.argmax())]
        assert found["score"] == pytest.approx(float(scores.max()), abs=1e-4)
        assert llama.classify([text])[0]["logits"] == pytest.approx(found["logits"], abs=1e-4)


def test_a_classifier_embeds_too(classifier: tuple[Llama, Any]) -> None:
    llama, reference = classifier
    expected = hidden(reference.model, ids(llama, TEXTS[0]), "mean")
    assert (llama.embed(TEXTS[:1])[0] - expected).abs().max() < 1e-4


def test_an_output_beside_the_classes_is_ignored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write(tmp_path, LlamaForSequenceClassification, num_labels=2)
    expected = build(tmp_path).classify(TEXTS[:1])
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.ones(768, 64)}, path)
    assert build(tmp_path).classify(TEXTS[:1]) == expected


@pytest.mark.parametrize(
    ("id2label", "labels"),
    [
        ({"0": "no"}, ["no", "LABEL_1"]),
        ({"0": "no", "1": "yes", "7": "perhaps"}, ["no", "yes"]),
        ({"0": 3, "x": []}, ["3", "LABEL_1"]),
        (None, ["LABEL_0", "LABEL_1"]),
        ([], ["LABEL_0", "LABEL_1"]),
    ],
)
def test_there_are_as_many_labels_as_the_weights_have(
    id2label: object, labels: list[str], tmp_path: Path
) -> None:
    write(tmp_path, LlamaForSequenceClassification, num_labels=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": id2label}))
    assert build(tmp_path).model.params.labels == labels


@pytest.mark.parametrize("n", [1, 2])
def test_a_classifier_in_metas_layout_loads_again(
    n: int, classifier: tuple[Llama, Any], tmp_path: Path
) -> None:
    llama, _ = classifier
    files = {"tokenizer.model": TINY / "tokenizer.model"}
    params = llama.model.params
    save([llama.model.state_dict()], params, tmp_path / "out", n, files)
    again = build(tmp_path / "out")
    assert again.model.params.labels == ["bad", "so so", "good"]
    # The attention kernel may round otherwise in rows of other memory.
    for found, expected in zip(again.classify(TEXTS), llama.classify(TEXTS), strict=True):
        assert found["label"] == expected["label"]
        assert found["logits"] == pytest.approx(expected["logits"], abs=1e-5)


class TestErrors:
    @pytest.mark.parametrize("pooling", ["max", "", None, ["mean"]])
    def test_unknown_pooling(self, pooling: Any, writer: tuple[Llama, Any]) -> None:
        with pytest.raises(ValueError, match=r"pooling is .*: expected 'mean' or 'last'"):
            writer[0].embed(["a"], pooling)

    def test_a_classifier_writes_no_text(self, classifier: tuple[Llama, Any]) -> None:
        llama = classifier[0]
        for call in (
            lambda: llama.generate([[1]], 1),
            lambda: llama.text_completion(["a"]),
            lambda: llama.chat_completion([[{"role": "user", "content": "a"}]]),
            lambda: list(llama.text_completion_stream("a")),
        ):
            with pytest.raises(ValueError, match="this checkpoint classifies and writes no text"):
                call()

    def test_a_writer_does_not_classify(self, writer: tuple[Llama, Any]) -> None:
        with pytest.raises(ValueError, match="this checkpoint has no labels, which"):
            writer[0].classify(["a"])

    def test_too_long_a_text(self, writer: tuple[Llama, Any]) -> None:
        with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, more than max_seq_len"):
            writer[0].embed(["a", LONG * 2])

    @pytest.mark.parametrize("texts", ["a text", None, 3])
    def test_no_list(self, texts: Any, writer: tuple[Llama, Any]) -> None:
        with pytest.raises(TypeError, match=r"texts (is|are) .*: give a list"):
            writer[0].embed(texts)

    def test_no_text(self, writer: tuple[Llama, Any]) -> None:
        with pytest.raises(TypeError, match="the tokenizer encodes str, not int: 3"):
            writer[0].embed(["a", 3])

    def test_an_empty_text_where_texts_have_no_beginning(self, writer: tuple[Llama, Any]) -> None:
        llama = writer[0]
        begin, llama.tokenizer.add_bos = llama.tokenizer.bos_id, False
        try:
            assert torch.equal(llama.embed([""]), llama.embed([""], "last"))  # the beginning's
            llama.tokenizer.bos_id = -1
            with pytest.raises(ValueError, match="a prompt has no tokens"):
                llama.embed(["a", ""])
        finally:
            llama.tokenizer.bos_id, llama.tokenizer.add_bos = begin, True

    def test_weights_that_give_no_numbers(self, tmp_path: Path) -> None:
        write(tmp_path)
        llama = build(tmp_path)
        llama.model.norm.weight.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="are not finite"):
            llama.embed(["a"])

    def test_a_classifier_without_its_classes(self, tmp_path: Path) -> None:
        write(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["architectures"] = ["LlamaForSequenceClassification"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"lacks output\.weight|expected a list of names"):
            build(tmp_path)
