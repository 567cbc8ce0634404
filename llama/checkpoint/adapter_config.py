"""``adapter_config.json``: the settings of PEFT's adapters, as far as this library honours them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.checkpoint.params import read_params
from llama.checkpoint.patterns import compiled
from llama.errors import LARGEST, printable

PROMPT_KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""The kinds that put virtual tokens in front of a prompt, and change no weight."""

MERGE = "merge the adapter with PEFT (merge_and_unload) and load the result"

_USE_PEFT = "run the adapter with PEFT itself, which can't merge this kind either"

# Those that PEFT can't merge either.
_UNMERGEABLE = (
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "XLORA"),
)
_OF_ALL = {
    *("peft_type", "task_type", "modules_to_save", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision", "peft_version"),
}
# LoRA's settings that are read here, and those without effect on a trained adapter.
# target_modules and the like have none because every tensor of the file is used.
_LORA = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("init_lora_weights", "trainable_token_indices", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
}
# The saved embeddings are the encoder's results, so that its settings have no effect.
_PROMPT = {
    *("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"),
    *("num_transformer_submodules", "prompt_tuning_init", "prompt_tuning_init_text"),
    *("tokenizer_name_or_path", "tokenizer_kwargs", "encoder_reparameterization_type"),
    *("encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "prefix_projection"),
    "init_weights",
}
# Others change the base's weights, and the saved factors make sense with those only.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

_AROUND = (r"(.*\.)?(", ")$")  # a pattern, in PEFT's rule


def read_config(path: Path) -> dict[str, Any]:
    """Read an adapter's configuration, all of which can be honoured.

    ``modules_to_save`` and, of LoRA, ``rank_pattern`` and ``alpha_pattern`` are filled in where
    they are unset.

    Raises:
        FileNotFoundError: ``path`` doesn't exist.
        ValueError: the file is malformed, or sets something that can't be honoured.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the directory that PEFT saved the adapter to")
    config = read_params(path)
    kind = config.get("peft_type")
    if kind not in ("LORA", *PROMPT_KINDS):
        advice = _USE_PEFT if kind in _UNMERGEABLE else MERGE
        raise ValueError(
            f"{path} has the peft_type {printable(repr(kind))}: this library reads 'LORA', "
            f"{', '.join(map(repr, PROMPT_KINDS))}; {advice}"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        task = printable(repr(config["task_type"]))
        raise ValueError(f"{path} has the task_type {task}: expected 'CAUSAL_LM' or 'SEQ_CLS'")
    known = _OF_ALL | (_LORA if kind == "LORA" else _PROMPT)
    for key, value in config.items():
        if key not in known and value:
            raise ValueError(
                f"{path} sets {printable(key)} to {printable(repr(value))}, which can't be "
                f"honoured here: {MERGE if kind == 'LORA' else _USE_PEFT}"
            )
    saved = config["modules_to_save"] = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ValueError(
            f"modules_to_save in {path} is {printable(repr(saved))}: expected a list of names"
        )
    (_check_lora if kind == "LORA" else _check_prompt)(config, path)
    return config


def _check_lora(config: dict[str, Any], path: Path) -> None:
    if config.get("init_lora_weights") not in _INITIALISATIONS:
        raise ValueError(
            f"{path} has init_lora_weights {printable(repr(config['init_lora_weights']))}, which "
            "changes the base's own weights: save the adapter as a plain LoRA "
            "(path_initial_model_for_weight_conversion) or merge it with PEFT"
        )
    if config.get("use_dora") and config.get("lora_bias"):
        raise ValueError(f"{path} sets both use_dora and lora_bias, which PEFT never does: {MERGE}")
    _check_number(config.get("r"), "r", path, whole=True)
    _check_number(config.get("lora_alpha"), "lora_alpha", path)
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config[key] = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{key} in {path} is {printable(repr(patterns))}: expected an object")
        for pattern, value in patterns.items():
            _check_number(value, f"{key}'s {printable(pattern)}", path, whole)
            compiled(pattern, key, path, *_AROUND)


def _check_prompt(config: dict[str, Any], path: Path) -> None:
    _check_number(config.get("num_virtual_tokens"), "num_virtual_tokens", path, whole=True)
    if config.get("num_transformer_submodules") not in (None, 1):
        n = printable(repr(config["num_transformer_submodules"]))
        raise ValueError(
            f"{path} has the num_transformer_submodules {n}, of an encoder and a decoder: a Llama "
            "has 1"
        )
    if config["peft_type"] == "PREFIX_TUNING" and config.get("task_type") == "SEQ_CLS":
        raise ValueError(
            f"{path} is prefix tuning of a classifier: it works for causal models only; train the "
            "classifier's adapter as 'PROMPT_TUNING', 'P_TUNING' or 'LORA'"
        )


def _check_number(value: object, name: str, path: Path, whole: bool = False) -> None:
    if type(value) is int and abs(value) <= LARGEST and (value > 0 or not whole):
        return
    if type(value) is not float or whole or not abs(value) <= LARGEST:
        expected = "a whole number above 0" if whole else "a number"
        raise ValueError(f"{name} is {printable(repr(value))} in {path}: expected {expected}")


def _matches(pattern: str, module: str) -> bool:
    """Return whether a rank's or an alpha's pattern applies to a module, by PEFT's rule.

    Source: ``get_pattern_key`` in https://github.com/huggingface/peft (src/peft/utils/other.py).
    """
    before, behind = _AROUND
    return re.match(f"{before}{pattern}{behind}", module) is not None


def rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return a module's rank and the scale of its factors' product, by PEFT's rules."""

    def value(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((patterns[p] for p in patterns if _matches(p, module)), default)

    rank = value(config["rank_pattern"], config["r"])
    alpha = value(config["alpha_pattern"], config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def row_indices(module: str, config: Mapping[str, Any], path: Path) -> list[int]:
    """Return the indices of the rows of an embedding that have been trained.

    Raises:
        ValueError: the configuration has no list of them.
    """
    setting = config.get("trainable_token_indices")
    by_module = setting if isinstance(setting, dict) else {"embed_tokens": setting}
    # A tied lm_head has those of the embedding.
    names = (module, "embed_tokens") if module == "lm_head" else (module,)
    matching = [by_module[end] for name in names for end in by_module if name.endswith(end)]
    indices = matching[0] if matching else None
    if not isinstance(indices, list) or not all(type(i) is int for i in indices):
        raise ValueError(
            f"{path} has rows of {module}, but trainable_token_indices in adapter_config.json is "
            f"{printable(repr(setting))}: one of the two files belongs to another adapter"
        )
    return indices
