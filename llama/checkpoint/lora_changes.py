"""LoRA and DoRA adapters as the changes that they make to weights and biases."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.args import ModelArgs
from llama.checkpoint.adapter_config import MERGE, rank_and_scale, row_indices
from llama.checkpoint.base import Shape
from llama.checkpoint.hf_names import hf_name, is_rotary, meta_name, to_interleaved
from llama.checkpoint.sharding import full_shapes
from llama.errors import printable

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"

# Names that compilers and trainers put around a module's.
_WRAPPERS = re.compile(
    r"^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# The parts of a tensor's name after the module's. The adapter's own name stands there in a raw
# state dictionary, and PEFT leaves it out when it saves.
_ROLES = re.compile(
    r"\.(?P<role>lora_embedding_[AB]|lora_[AB]|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta|(token_adapter\.)?base_layer)"
    r"(\.(?!weight$|bias$)[^.]+)?(\.(?P<part>weight|bias))?$"
)
# In front of a part, or of the modules within the one that was trained.
_COPIES = re.compile(r"\.(modules_to_save(\.default)?|original_module)(?=\.)")


@dataclass
class Change:
    """An adapter's change of one weight or bias; its parts apply in this order.

    Attributes:
        base: replaces the weight and the one tied to it.
        whole: replaces the weight alone.
        rows: indices, and the rows that replace those.
        factors: tensors of the shapes (n, r) and (r, m), and the scale of their product.
        added: a vector that is added to a bias, and its scale.
        magnitude: the norms that the outputs' weights get (DoRA, https://arxiv.org/abs/2402.09353).
        out_dim: along which dimension of the weight the outputs lie: of an embedding, the second.
        head_dim: the size of a head, for queries and keys, whose rows the adapter has in another
            order; None for others.
    """

    base: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    rows: tuple[list[int], torch.Tensor] | None = None
    factors: tuple[torch.Tensor, torch.Tensor, float] | None = None
    added: tuple[torch.Tensor, float] | None = None
    magnitude: torch.Tensor | None = None
    out_dim: int = 0
    head_dim: int | None = None

    @property
    def replacement(self) -> torch.Tensor | None:
        return self.base if self.whole is None else self.whole

    def apply(self, read_base: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the changed weight in float32, so that it is rounded once, when it is stored."""
        new = self.replacement
        weight = (read_base() if new is None else self.ordered(new)).float()
        if self.rows is not None:
            indices, rows = self.rows
            weight = weight.index_copy(0, torch.tensor(indices), rows.float())
        if self.factors is not None:
            left, right, scale = self.factors
            weight = weight.addmm(self.ordered(left.float()), right.float(), alpha=scale)
        if self.added is not None:
            vector, scale = self.added
            weight = weight.add(self.ordered(vector.float()), alpha=scale)
        if self.magnitude is not None:
            norm = weight.norm(dim=1 - self.out_dim)
            ratio = self.ordered(self.magnitude.float()) / norm
            weight = weight * ratio.unsqueeze(1 - self.out_dim)
        return weight

    def ordered(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of the weight in Meta's order."""
        return rows if self.head_dim is None else to_interleaved(rows, self.head_dim)


def read_changes(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], args: ModelArgs, path: Path
) -> dict[str, Change]:
    """Return the changes that a file's tensors make, by Meta's name of the parameter.

    Args:
        tensors: under PEFT's names.
        config: of the adapter (``read_config``).
        args: of the base.
        path: of the file, for errors.

    Raises:
        ValueError: a tensor is unknown or missing.
    """
    modules = {name.rpartition(".")[0] for name in full_shapes(args).keys() | {OUTPUT}}
    classifies = args.labels is not None or config.get("task_type") == "SEQ_CLS"
    head, other_head = ("score", "lm_head") if classifies else ("lm_head", "score")
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = defaultdict(dict)
    # LoRA wraps the model in another one; what puts tokens in front of a prompt doesn't.
    prefix = "base_model.model." if config["peft_type"] == "LORA" else "base_model."
    for key, tensor in tensors.items():
        module, role, part = _parse(key, prefix, path)
        if module is None or meta_name(module) not in modules or module == other_head:
            raise ValueError(
                f"{path} changes {printable(key)}, which the base model lacks: the adapter "
                "belongs to another model"
            )
        if role in found[module, part]:
            raise ValueError(f"{path} holds {printable(key)} twice: of two adapters, save one")
        found[module, part][role] = tensor
    if not found and config["peft_type"] == "LORA":
        raise ValueError(f"{path} has no tensors: save the adapter again")
    names = {hf_name(name) for name in modules - {"output"}} | {head}
    saved = tuple(config["modules_to_save"])
    missing = sorted(n for n in names - {module for module, _ in found} if n.endswith(saved))
    if missing:
        raise ValueError(
            f"{path} lacks {missing[0]}, which modules_to_save in adapter_config.json names: save "
            "the adapter again"
        )
    return {
        f"{meta_name(module)}.{part}": _change(module, part, roles, config, args, path)
        for (module, part), roles in found.items()
    }


def _parse(key: str, prefix: str, path: Path) -> tuple[str | None, str, str]:
    """Return a tensor's module, its role there, and "weight" or "bias", which it is part of.

    The module is None where the name isn't one of a model that PEFT wrapped.
    """
    name = _WRAPPERS.sub("", key)
    is_ours = name.startswith(prefix)
    name = _WRAPPERS.sub("", name.removeprefix(prefix))
    copy = _COPIES.search(name)
    name = _COPIES.sub("", name, count=1)
    match = _ROLES.search(name)
    if match is not None:
        module, role, part = name[: match.start()], match["role"], match["part"] or "weight"
        if role.endswith("base_layer"):
            role = "base"
    else:
        module, _, part = name.rpartition(".")
        role = "plain"
    if copy is not None:
        role = "base" if copy[1] == "original_module" else "whole"
    known = ("base", "whole", "plain", "lora_B") if part == "bias" else ("weight",)
    if part not in ("weight", "bias") or (part == "bias" and role not in known):
        raise ValueError(
            f"{path} has {printable(key)}: expected a Llama's LoRA factors, weights and biases "
            f"only; {MERGE}"
        )
    return module if is_ours else None, role, part


def _change(
    module: str,
    part: str,
    roles: dict[str, torch.Tensor],
    config: Mapping[str, Any],
    args: ModelArgs,
    path: Path,
) -> Change:
    """Return the change that the tensors of a module's weight or bias, by their roles, make."""
    name = f"{meta_name(module)}.{part}"
    is_table = name == EMBEDDING
    change = Change(head_dim=args.head_dim if is_rotary(str(meta_name(module))) else None)
    change.out_dim = int(is_table)
    change.base, change.whole = roles.pop("base", None), roles.pop("whole", None)
    if "plain" in roles:
        trained = module.endswith(tuple(config["modules_to_save"]))
        setattr(change, "whole" if trained else "base", roles.pop("plain"))
    if part == "bias":
        if "lora_B" in roles:
            change.added = roles.pop("lora_B"), rank_and_scale(module, config)[1]
        return change
    if "token_adapter.trainable_tokens_delta" in roles:
        rows = roles.pop("token_adapter.trainable_tokens_delta")
        change.rows = row_indices(module, config, path), rows
    if not roles:
        return change
    pair = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A", "lora_B")
    expected = [*pair, "lora_magnitude_vector"] if config.get("use_dora") else [*pair]
    if roles.keys() != set(expected):
        raise ValueError(
            f"{path} has {', '.join(roles)} of {module}: expected {', '.join(expected)}; save the "
            "adapter again"
        )
    a, b = (roles[role] for role in pair)
    rank, scale = rank_and_scale(module, config)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{path} has LoRA factors of the shapes {tuple(a.shape)} and {tuple(b.shape)} for "
            f"{module}, but adapter_config.json makes its rank {rank}: one of the two files "
            "belongs to another adapter"
        )
    # An embedding's factors are those of its transpose.
    change.factors = (a.T, b.T, scale) if is_table else (b, a, scale)
    change.magnitude = roles.get("lora_magnitude_vector")
    return change


def stays_tied(changes: dict[str, Change], config: Mapping[str, Any], path: Path) -> bool:
    """Return whether a tied output still is the embedding, as it would be in PEFT's model.

    Then the changes are made of the embedding alone; otherwise of both, each with its own.

    Raises:
        ValueError: the changes contradict each other.
    """
    both = config.get("ensure_weight_tying") and EMBEDDING in changes
    embedding = changes.setdefault(EMBEDDING, Change(out_dim=1))
    output = changes.setdefault(OUTPUT, Change())
    bases = [change.base for change in (embedding, output) if change.base is not None]
    if len(bases) == 2 and not torch.equal(*bases):
        raise ValueError(f"{path} has an embed_tokens and an lm_head that differ: the base has one")
    embedding.base = output.base = bases[0] if bases else None
    own = [c.whole is not None or c.factors is not None for c in (embedding, output)]
    if embedding.rows is not None and own[1]:
        raise ValueError(
            f"{path} changes rows of the embedding and all of the output, which are one in the "
            "base: merge the adapter with PEFT and load the result"
        )
    # Rows that are trained in the embedding change the output with it, unless it has its own.
    same_rows = output.rows is None or (
        embedding.rows is not None
        and embedding.rows[0] == output.rows[0]
        and torch.equal(embedding.rows[1], output.rows[1])
    )
    # Magnitudes are a row's in one and a column's in the other.
    if embedding.magnitude is not None or (not both and (any(own) or not same_rows)):
        return False
    del changes[OUTPUT]
    return True


def check_change(name: str, change: Change, shape: Shape | None, path: Path) -> None:
    """Raise ``ValueError`` if an adapter's tensors don't fit a parameter of this shape.

    The shape is None of a parameter that the network doesn't have, as a norm's bias.
    """
    module, _, part = name.rpartition(".")
    if shape is None:
        raise ValueError(
            f"{path} changes {hf_name(module)}.{part}, which a Llama lacks: the adapter belongs to "
            "another model"
        )
    pairs = []
    if change.replacement is not None:
        pairs.append((change.replacement, shape))
    if change.factors is not None:
        left, right, _ = change.factors
        pairs += [(left, (shape[0], left.shape[1])), (right, (right.shape[0], *shape[1:]))]
    if change.added is not None:
        pairs.append((change.added[0], shape))
    if change.magnitude is not None:
        pairs.append((change.magnitude, (shape[change.out_dim],)))
    if change.rows is not None:
        indices, rows = change.rows
        pairs.append((rows, (len(indices), *shape[1:])))
        if not all(0 <= i < shape[0] for i in indices):
            raise ValueError(f"{path} has rows of {name} beyond its {shape[0]}: of another model?")
    hint = ""
    if name in (EMBEDDING, OUTPUT):
        hint = ", or its vocabulary was resized and it wasn't saved with save_embedding_layers=True"
    for tensor, expected in pairs:
        if tensor.shape != expected:
            raise ValueError(
                f"{path} has the shape {tuple(tensor.shape)} for {hf_name(module)}.{part}, where "
                f"{expected} is expected: the adapter belongs to another model{hint}"
            )
