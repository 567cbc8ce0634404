"""LoRA adapters that PEFT wrote, merged: the logits are those of PEFT's own model."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import write_adapter
from peft_files import (
    ATTENTION,
    HEAD_DIM,
    TIED,
    TOKENS,
    VARIANTS,
    expected_logits,
    logits,
    make_reference,
    write_base,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from llama.checkpoint.base import Checkpoint
from llama.checkpoint.hf_names import from_interleaved, hf_name, meta_name, to_interleaved
from llama.checkpoint.lora import apply_adapter
from llama.checkpoint.meta import open_meta
from llama.generation import TINY

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_peft(variant: str, tmp_path: Path) -> None:
    reference = make_reference()
    base = open_meta(write_base(reference, tmp_path / "base"))
    plain = logits(base)
    assert (plain - expected_logits(reference)).abs().max() < 1e-4
    model = write_adapter(reference, tmp_path / "adapter", VARIANTS[variant])
    merged = logits(apply_adapter(base, tmp_path / "adapter"))
    assert (merged - expected_logits(model)).abs().max() < 1e-4
    assert (merged - plain).abs().max() > 1e-2


@pytest.mark.parametrize("variant", TIED)
def test_tied_weights_part_where_peft_parts_them(variant: str, tmp_path: Path) -> None:
    options, tied = TIED[variant]
    reference = make_reference(tied=True)
    base = open_meta(write_base(reference, tmp_path / "base"))
    model = write_adapter(reference, tmp_path / "adapter", options)
    merged = apply_adapter(base, tmp_path / "adapter")
    assert merged.params["tie_word_embeddings"] is tied
    assert (logits(merged) - expected_logits(model)).abs().max() < 1e-4


RESIZED: dict[str, dict[str, Any]] = {
    "plain": {},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora": {"target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, 52]},
}


@pytest.mark.parametrize("variant", RESIZED)
@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_comes_with_the_adapter(
    variant: str, tied: bool, tmp_path: Path
) -> None:
    reference = make_reference(tied=tied)
    base = open_meta(write_base(reference, tmp_path / "base"))
    reference.resize_token_embeddings(56)
    options = {"target_modules": ["q_proj"], **RESIZED[variant]}
    model = write_adapter(reference, tmp_path / "adapter", options, save_embedding_layers=True)
    merged = apply_adapter(base, tmp_path / "adapter")
    assert merged.params["vocab_size"] == 56
    tokens = torch.tensor([[1, 52, 55, 7]])
    assert (logits(merged, tokens) - expected_logits(model, tokens)).abs().max() < 1e-4


def test_a_classifiers_adapter_makes_a_classifier(tmp_path: Path) -> None:
    for tied in (False, True):
        directory = tmp_path / str(tied)
        plain = make_reference(tied=tied)
        base = open_meta(write_base(plain, directory / "base"))
        reference = make_reference(LlamaForSequenceClassification, labels=3)
        reference.model.load_state_dict(plain.model.state_dict())
        model = write_adapter(
            reference, directory / "adapter", {"task_type": "SEQ_CLS", "target_modules": ATTENTION}
        )
        merged = apply_adapter(base, directory / "adapter")
        assert merged.params["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
        tokens = TOKENS.clamp(min=1)
        found = logits(merged, tokens)[:, -1]
        assert (found - expected_logits(model, tokens)).abs().max() < 1e-4


def test_bases_in_two_files_and_bfloat16(tmp_path: Path) -> None:
    reference = make_reference()
    base = open_meta(write_base(reference, tmp_path / "base", shards=2))
    write_adapter(reference, tmp_path / "adapter", {"target_modules": "all-linear"})
    two = apply_adapter(base, tmp_path / "adapter")
    one = apply_adapter(
        open_meta(write_base(make_reference(), tmp_path / "one")), tmp_path / "adapter"
    )
    assert len(two.parts) == 1
    for name in one.parts[0]:
        torch.testing.assert_close(two.parts[0][name], one.parts[0][name], atol=0, rtol=0)
    half = open_meta(write_base(make_reference().bfloat16(), tmp_path / "half"))
    name = "layers.1.attention.wq.weight"
    weight = apply_adapter(half, tmp_path / "adapter").parts[0][name]
    # Nothing is rounded to the base's bfloat16: a network in float32 gets all of the change.
    change = one.parts[0][name] - open_meta(tmp_path / "one").parts[0][name]
    rounded = half.parts[0][name].float()
    torch.testing.assert_close(weight - rounded, change, atol=1e-6, rtol=0)


def test_adapters_on_one_another(tmp_path: Path) -> None:
    reference = make_reference(tied=True)
    merged = open_meta(write_base(reference, tmp_path / "base"))
    for number, options in enumerate(
        (
            {"target_modules": ["q_proj", "lm_head"], "r": 3},
            {"target_modules": ["q_proj", "k_proj", "embed_tokens"], "use_rslora": True},
        )
    ):
        directory = tmp_path / str(number)
        model = write_adapter(reference, directory, options)
        # Merging, PEFT would add the change of one tied weight to both, unlike its own model.
        head = model.base_model.model.lm_head
        head = getattr(head, "base_layer", head)
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        reference = model.merge_and_unload()
        merged = apply_adapter(merged, directory)
    assert (logits(merged) - expected_logits(reference)).abs().max() < 1e-4


def test_what_stays_the_same_stays_mapped(tmp_path: Path) -> None:
    reference = make_reference()
    base = open_meta(write_base(reference, tmp_path / "base"))
    write_adapter(reference, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    merged = apply_adapter(base, tmp_path / "adapter")
    for name in ("norm.weight", "layers.0.attention.wk.weight", "output.weight"):
        assert merged.parts[0][name].data_ptr() == merged.mapped(name)[0].data_ptr()
    before = base.parts[0]["layers.0.attention.wq.weight"].clone()
    assert not torch.equal(merged.parts[0]["layers.0.attention.wq.weight"], before)
    assert torch.equal(base.parts[0]["layers.0.attention.wq.weight"], before)


def test_pytorch_files_and_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    reference = make_reference()
    base = open_meta(write_base(reference, tmp_path / "base"))
    base.files = {
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"",
        "generation_config.json": b"",
    }
    directory = tmp_path / "adapter"
    model = write_adapter(reference, directory, {"target_modules": ATTENTION})
    (directory / "tokenizer_config.json").write_text("{}")
    assert apply_adapter(base, directory).files == base.files
    shutil.copy(TINY / "tokenizer.model", directory)
    file = directory / "adapter_model.safetensors"
    torch.save(load_file(file), directory / "adapter_model.bin")
    file.unlink()
    merged = apply_adapter(base, directory)
    assert (logits(merged) - expected_logits(model)).abs().max() < 1e-4
    assert sorted(merged.files) == [
        "generation_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    reference = make_reference()
    write_base(reference, directory / "base")
    write_base(make_reference(tied=True), directory / "tied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_adapter(reference, directory / "adapter", {"target_modules": ["q_proj"]})
    return directory


@pytest.fixture
def attempt(adapter_files: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """Applies the adapter with changed settings and tensors."""

    def apply(
        settings: dict[str, Any] | None = None,
        tensors: dict[str, torch.Tensor | None] | None = None,
        base: str = "base",
    ) -> Checkpoint:
        directory = tmp_path / "adapter"
        shutil.copytree(adapter_files / "adapter", directory, dirs_exist_ok=True)
        config = directory / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | (settings or {})))
        file = directory / "adapter_model.safetensors"
        changed = load_file(file) | (tensors or {})
        save_file({name: t for name, t in changed.items() if t is not None}, file)
        return apply_adapter(open_meta(adapter_files / base), directory)

    return apply


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3': this library reads 'LORA', .*merge_and_unload"),
        ({"peft_type": None}, "peft_type None"),
        ({"peft_type": "CPT"}, "peft_type 'CPT'.*PEFT itself"),
        ({"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS': expected"),
        ({"task_type": "SEQ_CLS"}, r"lacks the classifier's weight \(score\)"),
        ({"use_dora": True}, "has lora_A, lora_B of .*q_proj: expected .*lora_magnitude_vector"),
        ({"use_dora": True, "lora_bias": True}, "sets both use_dora and lora_bias"),
        ({"use_qalora": True}, "sets use_qalora to True, which can't be honoured"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"tomorrows_idea": "new"}, "sets tomorrows_idea to 'new'.*merge_and_unload"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', which changes",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"r": 0}, "r is 0 .*: expected a whole number"),
        ({"r": None}, "r is None"),
        ({"r": 8}, r"shapes \(4, 32\) and \(32, 4\) .*makes its rank 8"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x' .*: expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"rank_pattern": {"q_proj": 2}}, "makes its rank 2"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern's q_proj is 2.5"),
        ({"rank_pattern": [1]}, "rank_pattern in .* expected an object"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern in .* malformed pattern"),
        ({"alpha_pattern": {"(.*)*x": 2}}, "could take forever"),
        ({"alpha_pattern": {".*.*.*.*x": 2}}, "could take forever"),
        ({"alpha_pattern": {"(.|[^!])" * 26 + "!": 2}}, "could take forever"),
        ({"alpha_pattern": {"(.|[)]|x)" * 22 + "!": 2}}, "could take forever"),
        ({"rank_pattern": {"(?x:(.+) +!)": 2}}, "could take forever"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head, which modules_to_save"),
        ({"modules_to_save": "norm"}, "modules_to_save in .* expected a list of names"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    settings: dict[str, Any], message: str, attempt: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(ValueError, match=message):
        attempt(settings)


LAYER = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({Q_A: None}, "has lora_B of .*q_proj: expected lora_A, lora_B"),
        ({Q_A: torch.ones(4, 31)}, r"the shape \(4, 31\) for .*q_proj.weight, where \(4, 32\)"),
        ({Q_A: torch.ones(4)}, r"shapes \(4,\) and"),
        ({Q_A: torch.ones(0)}, r"shapes \(0,\) and"),
        ({Q_A: torch.ones(4, 32).long()}, "not a plain floating-point tensor"),
        ({Q_A.replace("layers.0", "layers.2"): torch.ones(4, 32)}, "which the base model lacks"),
        ({Q_A.replace("q_proj", "qkv"): torch.ones(4, 32)}, "which the base model lacks"),
        ({Q_A.removeprefix("base_model."): torch.ones(4, 32)}, "which the base model lacks"),
        ({"base_model.model.score.weight": torch.ones(3, 32)}, "which the base model lacks"),
        ({f"{LAYER}self_attn.q_proj.lora_A.bias": torch.ones(32)}, "has .*lora_A.bias: expected"),
        ({f"{LAYER}self_attn.q_proj.lora_C": torch.ones(32)}, "has .*lora_C: expected"),
        ({f"{LAYER}input_layernorm.bias": torch.ones(32)}, "input_layernorm.bias, which a Llama"),
        ({f"{LAYER}self_attn.q_proj.bias": torch.ones(31)}, r"\(31,\) for .*q_proj.bias, where"),
        (
            {Q_A.replace("weight", "other.weight"): torch.ones(4, 32)},
            "lora_A.* twice: of",
        ),
        ({f"{LAYER}self_attn.q_proj.lora_magnitude_vector": torch.ones(32)}, "magnitude_vector"),
        ({f"{LAYER}self_attn.q_proj.weight": torch.ones(16, 32)}, r"\(16, 32\) for .*q_proj"),
        (
            {
                f"{LAYER}input_layernorm.lora_A.weight": torch.ones(4, 32),
                f"{LAYER}input_layernorm.lora_B.weight": torch.ones(32, 4),
            },
            r"\(4, 32\) for .*input_layernorm",
        ),
        ({"base_model.model.model.embed_tokens.weight": torch.ones(56, 32)}, "but no lm_head"),
        ({"base_model.model.model.embed_tokens.weight": torch.ones(())}, "save_embedding_layers"),
        ({"base_model.model.lm_head.weight": torch.ones(56, 32)}, "save_embedding_layers=True"),
        (
            {
                "base_model.model.model.embed_tokens.weight": torch.ones(56, 32),
                "base_model.model.lm_head.weight": torch.ones(57, 32),
            },
            r"\(57, 32\) for lm_head.weight, where \(56, 32\)",
        ),
        (
            {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
            "trainable_token_indices in adapter_config.json is None",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tensors: dict[str, torch.Tensor | None], message: str, attempt: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(ValueError, match=message):
        attempt({}, tensors)


def test_rows_and_ties_that_contradict_are_refused(attempt: Callable[..., Checkpoint]) -> None:
    stem = "base_model.model.model.embed_tokens."
    rows = {f"{stem}token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
    with pytest.raises(ValueError, match="beyond its 50"):
        attempt({"trainable_token_indices": [1, 50]}, rows)
    with pytest.raises(ValueError, match=r"the shape \(2, 32\) for .* where \(3, 32\)"):
        attempt({"trainable_token_indices": [1, 5, 7]}, rows)
    head = {"base_model.model.lm_head.weight": torch.ones(50, 32)}
    with pytest.raises(ValueError, match="which are one in the base"):
        attempt(
            {"trainable_token_indices": [1, 2], "modules_to_save": ["lm_head"]}, rows | head, "tied"
        )
    with pytest.raises(ValueError, match="an lm_head that differ"):
        attempt({}, head | {f"{stem}weight": torch.zeros(50, 32)}, "tied")


def test_missing_damaged_and_invalid_files_are_refused(adapter_files: Path, tmp_path: Path) -> None:
    base = open_meta(adapter_files / "base")
    directory = tmp_path / "adapter"
    with pytest.raises(FileNotFoundError, match=r"no .*adapter_config.json: give the directory"):
        apply_adapter(base, directory)
    shutil.copytree(adapter_files / "adapter", directory)
    weights = directory / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        apply_adapter(base, directory)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter weights: expected adapter_model"):
        apply_adapter(base, directory)
    torch.save({"x": _Invalid()}, directory / "adapter_model.bin")
    with pytest.raises(ValueError, match="could run any code"):
        apply_adapter(base, directory)
    torch.save({}, directory / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no tensors"):
        apply_adapter(base, directory)


class _Invalid:
    def __reduce__(self) -> Any:
        return print, ("should not be run",)


def test_names_and_rows_go_both_ways() -> None:
    for name in ("model.embed_tokens", "model.layers.12.mlp.down_proj", "lm_head.weight"):
        meta = meta_name(name)
        assert meta is not None and hf_name(meta) == name
    assert meta_name("score.weight") == "output.weight"
    for name in ("model.layers.0.mlp", "layers.0.mlp.up_proj", "model.layers.01.mlp.up_proj", ""):
        assert meta_name(name) is None
    weight = torch.randn(3 * HEAD_DIM, 5)
    moved = to_interleaved(weight, HEAD_DIM)
    assert torch.equal(moved[1], weight[HEAD_DIM // 2])
    assert torch.equal(from_interleaved(moved, HEAD_DIM), weight)
