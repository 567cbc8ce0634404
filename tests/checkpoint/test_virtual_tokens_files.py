"""Files of prompt tuning and prefix tuning that can't be used, or can't be merged."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from peft_files import make_reference, open_model, write_base, write_virtual_tokens
from safetensors.torch import load_file, save_file

from llama import Transformer
from llama.adapters import Adapter
from llama.checkpoint import open_checkpoint
from llama.checkpoint.adapters import read_adapter
from llama.checkpoint.lora import apply_adapter
from llama.convert import convert


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("virtual")
    write_base(make_reference(), directory / "base")
    options: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt = PromptTuningConfig(**options)
        write_virtual_tokens(make_reference(), directory / "prompt", prompt)
        prefix = PrefixTuningConfig(**options)
        write_virtual_tokens(make_reference(), directory / "prefix", prefix)
    return directory


@pytest.fixture(scope="module")
def model(files: Path) -> Transformer:
    return open_model(files / "base")


@pytest.fixture
def attempt(files: Path, model: Transformer, tmp_path: Path) -> Callable[..., Adapter]:
    """Reads an adapter with changed settings and tensors."""

    def read(
        settings: dict[str, Any], tensors: dict[str, torch.Tensor | None], kind: str = "prompt"
    ) -> Adapter:
        directory = tmp_path / "adapter"
        shutil.copytree(files / kind, directory)
        config = directory / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        file = directory / "adapter_model.safetensors"
        changed = load_file(file) | tensors
        save_file({name: t for name, t in changed.items() if t is not None}, file)
        return read_adapter("a", directory, model)

    return read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": None}, "num_virtual_tokens is None .*: expected a whole number"),
        ({"num_virtual_tokens": float("nan")}, "num_virtual_tokens is nan"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_virtual_tokens": 10**30}, "num_virtual_tokens is 1000"),
        ({"num_virtual_tokens": 2**31 - 1}, r"shape \(3, 32\), where \(2147483647, 32\)"),
        ({"num_virtual_tokens": 4}, r"shape \(3, 32\), where \(4, 32\) is expected"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules 2, of an encoder"),
        ({"peft_type": "PREFIX_TUNING"}, r"where \(3, 64\) is expected"),
        ({"peft_type": "PREFIX_TUNING", "task_type": "SEQ_CLS"}, "works for causal models only"),
        ({"task_type": "SEQ_CLS"}, r"lacks the classifier's weight \(score\)"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "'MULTITASK_PROMPT_TUNING'.*PEFT itself"),
        ({"peft_type": "LORA"}, "sets num_[a-z_]+ to [0-9], which can't be honoured"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head, which modules_to_save"),
        ({"tomorrows_idea": "new"}, "sets tomorrows_idea to 'new'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], message: str, attempt: Callable[..., Adapter]
) -> None:
    """Else they would fail far from their cause, or change what the model says."""
    with pytest.raises(ValueError, match=message):
        attempt(settings, {})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": None, "base_model.lm_head.weight": torch.ones(50, 32)}, "lacks"),
        ({"prompt_embeddings": torch.ones(3)}, r"shape \(3,\), where \(3, 32\)"),
        ({"prompt_embeddings": torch.ones(3, 33)}, r"shape \(3, 33\), where \(3, 32\)"),
        ({"prompt_embeddings": torch.full((3, 32), float("nan"))}, "holds an infinity or a NaN"),
        ({"prompt_embeddings": torch.ones(3, 32).long()}, "not a plain floating-point tensor"),
        ({"base_model.lm_head.weight": torch.ones(49, 32)}, r"\(49, 32\) for lm_head.weight"),
        ({"base_model.other.weight": torch.ones(49, 32)}, "which the base model lacks"),
        ({"prompt_encoder.default.mlp_head.0.weight": torch.ones(2, 2)}, "base model lacks"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tensors: dict[str, torch.Tensor | None], message: str, attempt: Callable[..., Adapter]
) -> None:
    """A NaN in the cache would end the other sequences of a batch, too."""
    with pytest.raises(ValueError, match=message):
        attempt({}, tensors)


def test_prefixes_of_other_models_and_larger_caches_are_refused(
    attempt: Callable[..., Adapter],
) -> None:
    """Heads of another shape would be cut at wrong places; too many positions are past the end."""
    with pytest.raises(ValueError, match=r"\(3, 128\), where \(3, 64\)"):
        attempt({}, {"prompt_embeddings": torch.ones(3, 128)}, "prefix")


def test_virtual_tokens_that_fill_the_cache_are_refused(attempt: Callable[..., Adapter]) -> None:
    """The cache of 16 positions has no room for a prompt behind them."""
    many = {"prompt_embeddings": torch.ones(16, 32)}
    with pytest.raises(ValueError, match=r"16 virtual tokens, .* max_seq_len=16"):
        attempt({"num_virtual_tokens": 16}, many)


def test_virtual_tokens_are_not_merged(files: Path, tmp_path: Path) -> None:
    """Weights can't hold them: the way is another, and the error names it."""
    for kind, name in (("prompt", "PROMPT_TUNING"), ("prefix", "PREFIX_TUNING")):
        with pytest.raises(ValueError, match=rf"\({name}\), which can't .* Llama.load_adapter"):
            apply_adapter(open_checkpoint(files / "base"), files / kind)
        with pytest.raises(ValueError, match=r"Llama\.load_adapter"):
            convert(str(files / "base"), str(tmp_path / "out"), adapter=str(files / kind))


def test_other_vocabularies_are_merged_only(
    files: Path, model: Transformer, attempt: Callable[..., Adapter]
) -> None:
    """Logits of several widths don't fit one batch."""
    more = {
        "base_model.model.embed_tokens.weight": torch.ones(56, 32),
        "base_model.lm_head.weight": torch.ones(56, 32),
    }
    with pytest.raises(ValueError, match=r"56 rows, and the model's has 50: .*Llama\.build"):
        attempt({}, more)
