"""Adapters of PEFT beside a model's weights: the logits are those of PEFT's own model."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import make_hf, save_hf, write_adapter
from peft import PrefixTuningConfig, PromptTuningConfig
from peft.tuners.lora import LoraLayer
from peft_files import (
    BIASED,
    TIED,
    TOKENS,
    VARIANTS,
    expected_logits,
    make_reference,
    open_model,
    write_base,
    write_virtual_tokens,
)
from processes import forked, script
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from llama import Llama, Transformer
from llama.adapters import Adapter
from llama.checkpoint.adapters import read_adapter
from llama.checkpoint.hf_names import to_interleaved
from llama.layers.batch import Segment


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def adapted(model: Transformer, adapter: Adapter) -> Iterator[None]:
    """An adapter that all rows have."""
    for name, change in adapter.changes.items():
        model.get_submodule(name).adapted = change
    try:
        yield
    finally:
        for name in adapter.changes:
            model.get_submodule(name).adapted = None


def adapted_logits(model: Transformer, adapter: Adapter) -> torch.Tensor:
    with adapted(model, adapter):
        return model(TOKENS, 0)


CASES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    **{name: (options, {}) for name, options in VARIANTS.items()},
    **{f"{name} tied": (options, {"tied": True}) for name, (options, _) in TIED.items()},
    **{f"{name} bias": (options, {"biased": kind}) for name, (options, kind) in BIASED.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_beside_the_weights_are_those_of_peft(case: str, tmp_path: Path) -> None:
    """A part that is dropped, out of order, scaled or divided wrongly changes the logits."""
    options, kind = CASES[case]
    reference = make_reference(**kind)
    model = open_model(write_base(reference, tmp_path / "base"))
    plain = model(TOKENS, 0)
    expected = write_adapter(reference, tmp_path / "adapter", options)
    adapter = read_adapter("a", tmp_path / "adapter", model)
    assert (adapted_logits(model, adapter) - expected_logits(expected)).abs().max() < 1e-4
    assert torch.equal(model(TOKENS, 0), plain)


@pytest.mark.parametrize("case", ["all_linear", "dora", "embedding_and_output", "of_factors bias"])
def test_a_scale_is_that_of_peft(case: str, tmp_path: Path) -> None:
    """PEFT scales the low-rank product, also within DoRA's norms, and an added bias with it."""
    options, kind = CASES[case]
    reference = make_reference(**kind)
    model = open_model(write_base(reference, tmp_path / "base"))
    expected = write_adapter(reference, tmp_path / "adapter", options)
    for module in expected.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.4)
    adapter = read_adapter("a", tmp_path / "adapter", model, 0.4)
    assert (adapted_logits(model, adapter) - expected_logits(expected)).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifiers_adapter_brings_head_and_labels(tied: bool, tmp_path: Path) -> None:
    """Without its own head a base that writes text would give tokens' logits."""
    plain = make_reference(tied=tied)
    model = open_model(write_base(plain, tmp_path / "base"))
    reference = make_reference(LlamaForSequenceClassification, labels=3)
    reference.model.load_state_dict(plain.model.state_dict())
    options = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "embed_tokens"]}
    expected = write_adapter(reference, tmp_path / "adapter", options)
    adapter = read_adapter("a", tmp_path / "adapter", model)
    assert adapter.labels == ["LABEL_0", "LABEL_1", "LABEL_2"] and "output" not in adapter.changes
    assert adapter.head is not None
    tokens = TOKENS.clamp(min=1)
    with adapted(model, adapter):
        hidden = model.hidden_states(tokens[0], [Segment(0, 0, tokens.shape[1])])
    logits = hidden[-1] @ adapter.head.T
    assert (logits - expected_logits(expected, tokens)[0]).abs().max() < 1e-4


@pytest.mark.parametrize(("quantize", "group_size"), [("int8", None), ("int4", 32)])
def test_ratios_are_those_of_quantised_weights(
    quantize: str, group_size: int | None, tmp_path: Path
) -> None:
    """DoRA's norms are of the weights that are multiplied, or its outputs have other lengths."""
    reference = save_hf(make_hf(), tmp_path / "base")
    model = Llama.build(tmp_path / "base", quantize=quantize, group_size=group_size).model
    options = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    expected = write_adapter(reference, tmp_path / "adapter", options).base_model.model.model
    adapter = read_adapter("a", tmp_path / "adapter", model)
    wq, head_dim = model.layers[0].attention.wq, model.params.head_dim
    layer = expected.layers[0].self_attn.q_proj
    plain = to_interleaved(layer.base_layer.weight, head_dim)
    assert (wq.plain_weight() - plain).abs().max() > 1e-3
    changed = wq.plain_weight() + to_interleaved(layer.get_delta_weight("default"), head_dim)
    magnitude = to_interleaved(layer.lora_magnitude_vector["default"].weight, head_dim)
    change = adapter.changes["layers.0.attention.wq"]
    torch.testing.assert_close(change.ratio, magnitude / changed.norm(dim=1))
    table = model.tok_embeddings(torch.arange(768))
    layer = expected.embed_tokens
    norm = (table + layer.get_delta_weight("default")).norm(dim=0)
    ratio = layer.lora_magnitude_vector["default"].weight / norm
    torch.testing.assert_close(adapter.changes["tok_embeddings"].ratio, ratio)


RESULTS = """
import json, sys, torch
from pathlib import Path
from llama import Llama, parallel
def results(directory):
    llama = Llama.build(directory / "base", max_seq_len=48, dtype=torch.float32, device="cpu")
    found = {}
    for path in sorted(directory.iterdir()):
        if path.name != "base":
            llama.load_adapter(path.name, path)
            found[path.name] = result(llama, path.name)
    return found
def result(llama, name):
    if name == "classifier":
        return llama.classify(["Once"], adapter=name)[0]["logits"]
    options = {"temperature": 0, "logprobs": True, "echo": True, "adapter": name}
    tokens, scores = llama.generate([[1, 400, 27], [1, 9]], 6, **options)
    return [*tokens[0], *tokens[1], *scores[0], *scores[1]]
"""
WRITE_RESULTS = """
found = [results(Path(path)) for path in sys.argv[2:]]
with open(f"{sys.argv[1]}{parallel.rank()}", "w") as file:
    json.dump(found, file)
"""


def write_each_kind(directory: Path, kv_heads: int) -> Path:
    """A base, and adapters that change it in all ways."""
    sizes = {"attention_bias": True, "mlp_bias": True, "vocab_size": 769}
    sizes["num_key_value_heads"] = kv_heads

    def reference(kind: Any = LlamaForCausalLM) -> Any:
        return make_hf(kind, **sizes, num_labels=3, pad_token_id=0)

    save_hf(reference(), directory / "base")
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"]
    kinds: dict[str, dict[str, Any]] = {
        "lora": {"target_modules": [*everything, "lm_head"], "bias": "all"},
        "factors": {"target_modules": everything[:-1], "lora_bias": True},
        "dora": {"target_modules": [*everything, "lm_head"], "use_dora": True},
        "rows": {
            "target_modules": ["v_proj"],
            "trainable_token_indices": {"embed_tokens": [1, 400, 700], "lm_head": [3, 500, 768]},
        },
        "saved": {
            "target_modules": ["v_proj"],
            "modules_to_save": ["embed_tokens", "lm_head", "k_proj", "o_proj", "mlp", "norm"],
        },
        "classifier": {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    }
    for name, options in kinds.items():
        classifies = name == "classifier"
        base = reference(LlamaForSequenceClassification if classifies else LlamaForCausalLM)
        write_adapter(base, directory / name, options)
    prompt = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    write_virtual_tokens(reference(), directory / "prompt", prompt)
    prefix = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    write_virtual_tokens(reference(), directory / "prefix", prefix)
    return directory


@pytest.mark.slow
def test_two_ranks_have_the_results_of_one(tmp_path: Path) -> None:
    """Each kind of change is divided as its module is; sums get what is added once."""
    bases = [write_each_kind(tmp_path / str(kv_heads), kv_heads) for kv_heads in (1, 2)]
    scope: dict[str, Any] = {}
    exec(RESULTS, scope)
    expected = [scope["results"](base) for base in bases]
    job = script(tmp_path, RESULTS + WRITE_RESULTS)
    out = str(tmp_path / "rank")
    done = forked(job, out, *map(str, bases), n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        for found, alone in zip(
            json.loads(Path(f"{out}{rank}").read_text()), expected, strict=True
        ):
            for name, numbers in alone.items():
                assert found[name] == pytest.approx(numbers, abs=1e-3), name
