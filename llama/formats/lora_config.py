"""``adapter_config.json``: what of PEFT's many kinds of adapters can be merged."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.args import read_params
from llama.errors import printable

# Settings that are read here, and those without effect on what has been trained. Of the tensors
# in the file, which are what the target modules came to, none is left out.
_READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("init_lora_weights", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
}
_WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
}
# Others leave the base's weights changed, and what is saved makes sense with those only.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def read_config(path: Path) -> dict[str, Any]:
    """What an adapter's configuration says, if all of it can be merged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is malformed or asks for what can't be merged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the directory that PEFT saved the adapter to")
    config = read_params(path)
    if config.get("peft_type") != "LORA":
        kind = printable(repr(config.get("peft_type")))
        raise ValueError(f"{path} has the peft_type {kind}: only 'LORA' can be merged here")
    if config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        task = printable(repr(config["task_type"]))
        raise ValueError(f"{path} has the task_type {task}: expected 'CAUSAL_LM' or 'SEQ_CLS'")
    for key, value in config.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value:
            raise ValueError(
                f"{path} sets {printable(key)} to {printable(repr(value))}, which can't be "
                "honoured here: merge the adapter with PEFT (merge_and_unload) and load the result"
            )
    if config.get("init_lora_weights") not in _INITIALISATIONS:
        raise ValueError(
            f"{path} has init_lora_weights {printable(repr(config['init_lora_weights']))}, which "
            "changes the base's own weights: save the adapter as a plain LoRA "
            "(path_initial_model_for_weight_conversion) or merge it with PEFT"
        )
    _check_number(config.get("r"), "r", path, whole=True)
    _check_number(config.get("lora_alpha"), "lora_alpha", path)
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config[key] = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{key} in {path} is {printable(repr(patterns))}: expected an object")
        for pattern, value in patterns.items():
            _check_number(value, f"{key}'s {printable(pattern)}", path, whole)
            _check_pattern(pattern, key, path)
    saved = config["modules_to_save"] = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(
            f"modules_to_save in {path} is {printable(repr(saved))}: expected a list of names"
        )
    return config


def _check_number(value: object, name: str, path: Path, whole: bool = False) -> None:
    if type(value) is int and abs(value) < 2**31 and (value > 0 or not whole):
        return
    if type(value) is not float or whole or not abs(value) < 2**31:
        expected = "a whole number above 0" if whole else "a number"
        raise ValueError(f"{name} is {printable(repr(value))} in {path}: expected {expected}")


def _check_pattern(pattern: str, key: str, path: Path) -> None:
    # With a group under a quantifier, or many of them, it may take longer than anyone waits.
    if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"(?<!\()[*+?{]", pattern)) > 3:
        raise ValueError(
            f"{key} in {path} has the pattern {printable(pattern)}, which could take forever: "
            "write it with at most three of *, + and ?, and none behind a group"
        )
    try:
        _matches(pattern, "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{key} in {path} has the malformed pattern {printable(pattern)} ({error})"
        ) from error


def _matches(pattern: str, module: str) -> bool:
    """PEFT's rule for a rank's or an alpha's pattern."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Of one module, by PEFT's rules for patterns."""

    def value(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((patterns[p] for p in patterns if _matches(p, module)), default)

    rank = value(config["rank_pattern"], config["r"])
    alpha = value(config["alpha_pattern"], config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def row_indices(module: str, config: Mapping[str, Any], path: Path) -> list[int]:
    """Which rows of an embedding have been trained."""
    given = config.get("trainable_token_indices")
    by_module = given if isinstance(given, dict) else {"embed_tokens": given}
    # A tied lm_head has those of the embedding.
    names = (module, "embed_tokens") if module == "lm_head" else (module,)
    found = [by_module[end] for name in names for end in by_module if name.endswith(end)]
    indices = found[0] if found else None
    if not isinstance(indices, list) or not all(type(i) is int for i in indices):
        raise ValueError(
            f"{path} has rows of {module}, but trainable_token_indices in adapter_config.json is "
            f"{printable(repr(given))}: one of the two files belongs to another adapter"
        )
    return indices
