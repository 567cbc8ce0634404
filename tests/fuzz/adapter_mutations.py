"""Sound adapters of the embedded model, and damage of their settings."""

import json
import random
from pathlib import Path
from typing import Any

import json_mutations
import torch
from mutations import ODD_INTS, Files, _content, _save
from safetensors.torch import save

_BASE = {"dim": 192, "hidden": 512, "heads": 8, "kv_heads": 4, "layers": 4, "vocab": 768}


def adapter_bases() -> dict[str, Files]:
    """Adapters of the embedded model, as PEFT writes them."""
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    dim, kv = _BASE["dim"], _BASE["dim"] // _BASE["heads"] * _BASE["kv_heads"]
    lora, dora = {}, {}
    for i in range(_BASE["layers"]):
        for module, width in (("q_proj", dim), ("v_proj", kv)):
            name = f"base_model.model.model.layers.{i}.self_attn.{module}"
            lora[f"{name}.lora_A.weight"] = random_tensor(4, dim)
            lora[f"{name}.lora_B.weight"] = random_tensor(width, 4)
            dora[f"{name}.lora_magnitude_vector"] = random_tensor(width).abs() + 1
    saved = {"base_model.model.lm_head.weight": random_tensor(_BASE["vocab"], dim)}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {},
        "alpha_pattern": {"q_proj": 4},
        "modules_to_save": None,
        "use_rslora": False,
        "bias": "none",
    }
    virtual = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "token_dim": dim,
        "num_layers": _BASE["layers"],
        "num_attention_heads": _BASE["heads"],
        "num_transformer_submodules": 1,
        "base_model_name_or_path": "org/base",
    }
    prompts = {"prompt_embeddings": random_tensor(3, dim)}
    prefix = {"prompt_embeddings": random_tensor(3, 2 * _BASE["layers"] * kv)}
    dump = json_mutations.dump
    found: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
        "lora": (config, lora),
        "dora": ({**config, "use_dora": True}, lora | dora),
        "saved": ({**config, "modules_to_save": ["lm_head"]}, lora | saved),
        "prompt": ({**virtual, "peft_type": "PROMPT_TUNING"}, prompts),
        "prefix": ({**virtual, "peft_type": "PREFIX_TUNING", "num_attention_heads": 4}, prefix),
    }
    bases: dict[str, Files] = {
        name: {"adapter_config.json": dump(c), "adapter_model.safetensors": save(tensors)}
        for name, (c, tensors) in found.items()
    }
    bases["pytorch"] = {"adapter_config.json": dump(config), "adapter_model.bin": _save(lora)}
    return bases


def adapter_patterns(rng: random.Random, files: Files, marker: Path) -> str:
    """Patterns of modules, and settings of adapters that change what is calculated."""
    config = json.loads(_content(files, "adapter_config.json"))
    regex = rng.choice(json_mutations.REGEXES)
    settings: dict[str, Any] = {
        "rank_pattern": {regex: rng.choice((4, 2, 0, 10**9))},
        "alpha_pattern": {regex: rng.choice((4, 0, -1, 1e300))},
        "target_modules": rng.choice((regex, [regex] * 100, "all-linear")),
        "modules_to_save": [rng.choice(("lm_head", "embed_tokens", "norm", regex))],
        "r": rng.choice(ODD_INTS),
        "lora_alpha": rng.choice((*ODD_INTS, 1e300)),
        "peft_type": rng.choice(("LORA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "IA3")),
        "task_type": rng.choice(("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", None)),
        "num_virtual_tokens": rng.choice(ODD_INTS),
        "init_lora_weights": rng.choice(("pissa", "olora", "loftq", True)),
        "trainable_token_indices": rng.choice(([0, 1], [10**9], {"embed_tokens": [-1]}, "x")),
        "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"},
        "layer_replication": [[0, 2], [1, 3]],
        "use_rslora": True,
        "use_dora": True,
    }
    keys = rng.sample(sorted(settings), rng.choice((1, 2)))
    files["adapter_config.json"] = json_mutations.dump(config | {k: settings[k] for k in keys})
    return f"adapter settings: {', '.join(keys)}"
