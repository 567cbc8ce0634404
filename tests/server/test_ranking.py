"""Classifiers' heads over HTTP: /classify and /v1/rerank."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import make_hf, save_hf
from servers import post, serve
from transformers import LlamaForSequenceClassification

from llama import Llama
from llama.adapters import Adapter

TEXTS = ["Tom has a kite.", "a", "One more!"]
QUERY = "Who has a kite?"


def write(directory: Path, labels: list[str]) -> Any:
    names = {"id2label": dict(enumerate(labels)), "num_labels": len(labels)}
    kind = LlamaForSequenceClassification
    config = {"max_position_embeddings": 2048, "pad_token_id": 0, **names}
    return save_hf(make_hf(kind, **config), directory)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    path = tmp_path_factory.mktemp("classifier")
    reference = write(path, ["bad", "so so", "good"])
    with serve(Llama.build(path, dtype=torch.float32, device="cpu")) as (url, _):
        yield url, reference


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    path = tmp_path_factory.mktemp("ranker")
    reference = write(path, ["relevance"])
    with serve(Llama.build(path, dtype=torch.float32, device="cpu")) as (url, _):
        yield url, reference


@torch.inference_mode()
def logits(reference: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = reference(torch.tensor([ids])).logits[0]
    return found


def encode(tiny: Llama, text: str) -> list[int]:
    return tiny.tokenizer.encode(text, bos=True, eos=False)


def test_classes_are_those_of_transformers(classifier: tuple[str, Any], tiny: Llama) -> None:
    """A failure means that a text gets another label than the checkpoint gives it."""
    url, reference = classifier
    expected = [logits(reference, encode(tiny, text)).softmax(0) for text in TEXTS]
    ids = [encode(tiny, text) for text in TEXTS]
    for given in (TEXTS, ids):
        found = post(f"{url}/classify", {"input": given}).json()
        assert found["object"] == "list" and found["model"] == "tiny"
        for i, (probs, each) in enumerate(zip(expected, found["data"], strict=True)):
            assert each["index"] == i and each["num_classes"] == 3
            assert each["probs"] == pytest.approx(probs.tolist(), abs=1e-4)
            assert each["label"] == ["bad", "so so", "good"][int(probs.argmax())]
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    for one in (TEXTS[0], ids[0]):
        [alone] = post(f"{url}/classify", {"input": one}).json()["data"]
        assert alone["probs"] == pytest.approx(expected[0].tolist(), abs=1e-4)


def test_documents_are_ranked_by_the_score_of_their_pair(
    ranker: tuple[str, Any], tiny: Llama
) -> None:
    """A failure means that a search shows the wrong document first."""
    url, reference = ranker
    ids = [encode(tiny, QUERY) + encode(tiny, text) for text in TEXTS]
    expected = [float(logits(reference, each).sigmoid()) for each in ids]
    order = sorted(range(len(TEXTS)), key=lambda i: -expected[i])
    documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    body = {"query": QUERY, "documents": documents}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        found = post(f"{url}{path}", body).json()
        assert [each["index"] for each in found["results"]] == order
        for each in found["results"]:
            assert each["relevance_score"] == pytest.approx(expected[each["index"]], abs=1e-4)
            assert each["document"] == {"text": TEXTS[each["index"]]}
        assert found["usage"]["total_tokens"] == sum(map(len, ids))
    assert expected[order[0]] > expected[order[-1]] + 1e-3, "the texts make no difference"
    best = post(f"{url}/rerank", {**body, "top_n": 1, "return_documents": False}).json()
    [only] = best["results"]
    assert only["index"] == order[0] and only["document"] is None
    assert len(post(f"{url}/rerank", {**body, "top_n": 0}).json()["results"]) == 3
    cut = post(f"{url}/rerank", {**body, "documents": ["a " * 100], "max_tokens_per_doc": 2}).json()
    assert cut["usage"]["prompt_tokens"] == len(encode(tiny, QUERY)) + 3


def test_one_label_is_a_probability(ranker: tuple[str, Any], tiny: Llama) -> None:
    """A failure means that a head of one label gives 1 to every text."""
    url, reference = ranker
    expected = float(logits(reference, encode(tiny, TEXTS[0])).sigmoid())
    [found] = post(f"{url}/classify", {"input": TEXTS[0]}).json()["data"]
    assert found["probs"] == pytest.approx([expected], abs=1e-4)


def test_models_without_such_a_head_say_so(classifier: tuple[str, Any], tiny: Llama) -> None:
    """A failure means a 500, or scores that mean nothing."""
    llama = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=128, max_batch_size=2)
    body = {"query": QUERY, "documents": TEXTS}
    with serve(llama) as (url, _):
        for path, given in (("/classify", {"input": "a"}), ("/rerank", body)):
            answer = post(f"{url}{path}", given)
            assert answer.status_code == 400
            assert "has no labels" in answer.json()["error"]["message"]
    answer = post(f"{classifier[0]}/rerank", body)
    assert answer.status_code == 400
    assert "a head of 3 labels" in answer.json()["error"]["message"]
    text = post(f"{classifier[0]}/v1/completions", {"prompt": "a"})
    assert text.status_code == 400 and "classifies" in text.json()["error"]["message"]


def test_an_adapter_brings_a_head_to_a_model_that_writes(tiny: Llama) -> None:
    """A failure means that an adapter in the list of models answers no request."""
    llama = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=128, max_batch_size=2)
    head = torch.randn(1, 192, generator=torch.Generator().manual_seed(1))
    llama.adapters.add(Adapter("judge", {}, head=head, labels=["fits"]))
    expected = llama.classify(TEXTS, adapter="judge")
    with serve(llama) as (url, _):
        found = post(f"{url}/classify", {"model": "judge", "input": TEXTS}).json()
        assert found["model"] == "judge"
        for each, prediction in zip(found["data"], expected, strict=True):
            assert each["label"] == "fits"
            assert each["probs"] == pytest.approx([prediction["score"]], abs=1e-5)
        body = {"model": "judge", "query": QUERY, "documents": TEXTS}
        assert len(post(f"{url}/rerank", body).json()["results"]) == 3
        text = post(f"{url}/v1/completions", {"model": "judge", "prompt": "a"})
        assert text.status_code == 400
        assert "writes no text" in text.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": ["a"] * 3000}, "documents"),
        ({"query": "a", "documents": [{"title": "a"}]}, "documents.0"),
        ({"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ({"query": "a", "documents": ["a"], "colour": 1}, "colour"),
        ({"query": "a", "documents": ["a"], "model": "other"}, "model"),
    ],
)
def test_wrong_fields_are_named(body: dict[str, Any], param: str, ranker: tuple[str, Any]) -> None:
    """A failure means an answer that doesn't help."""
    answer = post(f"{ranker[0]}/v1/rerank", body)
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"].startswith(param)


def test_a_pair_that_is_too_long_is_refused(ranker: tuple[str, Any]) -> None:
    """A failure means that the end of a document is ignored without a word."""
    body = {"query": QUERY, "documents": ["the cat " * 600]}
    error = post(f"{ranker[0]}/v1/rerank", body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "documents")
    answer = post(f"{ranker[0]}/v1/rerank", {**body, "truncate_prompt_tokens": -1})
    assert answer.json()["usage"]["prompt_tokens"] == 512
    some = {"query": QUERY, "documents": TEXTS}
    lengths = [
        post(f"{ranker[0]}/v1/rerank", {**some, **cut}).json()["usage"]["prompt_tokens"]
        for cut in ({}, {"truncate_prompt_tokens": 6})
    ]
    assert lengths[1] == 18 < lengths[0]


def test_a_text_that_is_too_long(classifier: tuple[str, Any], tiny: Llama) -> None:
    """A failure means that a client can't shorten a text, or is told of a field that it didn't
    send."""
    url, _ = classifier
    text = "the cat " * 600
    error = post(f"{url}/classify", {"input": text}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    found = post(f"{url}/classify", {"input": text, "truncate_prompt_tokens": 4}).json()
    expected = post(f"{url}/classify", {"input": encode(tiny, text)[-4:]}).json()
    assert found["data"] == expected["data"] and found["usage"]["prompt_tokens"] == 4
