"""A checkpoint of any format as the network reads it: Meta's names and layout, made on demand."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from llama import parallel
from llama.args import ModelArgs
from llama.checkpoint.memory import release, trim
from llama.checkpoint.rounding import Scheme, is_made_here, make_scheme, round_weight
from llama.checkpoint.sharding import (
    Forms,
    distinct_pieces,
    form_of,
    full_shapes,
    input_widths,
    joined_shape,
    parameter_count,
    rank_part,
    split_dim,
    stored_dim,
)
from llama.errors import listed, printable
from llama.layers.quantization import Form, Grouped, StoredWeight
from llama.tokenizers import TEMPLATES

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

# The files that stand next to weights and concern text, by Hugging Face's names.
_TEXT_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of one part of a checkpoint under Meta's names, made when they are read.

    Args:
        shapes: the tensors' shapes by name, known before anything is read.
        read: returns the tensor of a name.
        mapped: returns the mapped tensors that a name's tensor is made from.

    Attributes:
        places: where ``read`` may put a name's tensor, instead of making a new one.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        read: Callable[[str], torch.Tensor],
        mapped: Callable[[str], Sequence[torch.Tensor]] = lambda name: (),
    ):
        self.shapes = dict(shapes)
        self.mapped = mapped
        self.places: dict[str, torch.Tensor] = {}
        self._read = read

    @staticmethod
    def of(tensors: Mapping[str, torch.Tensor], mapped: bool = False) -> "Weights":
        """Wrap existing tensors, which lie in memory or in ``mapped`` files."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return Weights(shapes, tensors.__getitem__, lambda name: (tensors[name],) if mapped else ())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass
class Checkpoint:
    """The common form of all formats.

    Attributes:
        source: the file that the hyper-parameters come from, for errors.
        params: the hyper-parameters, with the keys of ``params.json`` (``ModelArgs``).
        parts: the weights, in one or more parts as Meta divides them.
        names: the parts' names in errors.
        dtype: the dtype that the files give their weights, or that of most weights; a
            half-precision one if they are quantised.
        files: the files next to the weights that concern text, by Hugging Face's names:
            ``tokenizer.model`` or ``tokenizer.json``, ``tokenizer_config.json`` and so on.
        in_float32: whether tensors are made in float32 when they are read, because they are
            dequantised or merged.
        kinds: the format's own names of the types that tensors are stored in, by tensor.
        forms: the forms of quantised weights by module, which the network has as well.
        read_part: reads a rank's part of a parameter, given its name, the rank and the number of
            ranks; None if it is cut from the tensors of ``parts``.
        format: its name in ``llama.checkpoint.FORMATS``, by ``open_checkpoint``.
    """

    source: str
    params: dict[str, Any]
    parts: list[Weights]
    names: list[str]
    dtype: torch.dtype
    files: dict[str, Path | bytes] = field(default_factory=dict)
    in_float32: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)
    forms: Forms = field(default_factory=dict)
    read_part: Callable[[str, int, int], torch.Tensor] | None = None
    format: str = ""

    def check(self, args: ModelArgs) -> None:
        """Raise ``ValueError`` unless the parts together make the network of ``args``."""
        shapes = [part.shapes for part in self.parts]
        check_shapes(shapes, args, self.names, self.source, self.forms)

    def rank_part(self, name: str, args: ModelArgs, rank: int, ranks: int) -> torch.Tensor:
        """Read the part of a parameter that one of ``ranks`` ranks holds."""
        if self.read_part is not None:
            return self.read_part(name, rank, ranks)
        if name.startswith("output.") and args.tie_word_embeddings:
            whole = self.rank_part(name.replace("output", "tok_embeddings"), args, 0, 1)
            return rank_part(name, [whole], args, rank, ranks)
        return rank_part(name, [part[name] for part in self.parts], args, rank, ranks)

    def mapped(self, name: str) -> list[torch.Tensor]:
        """Return the mapped tensors that a parameter is made from."""
        return [tensor for part in self.parts if name in part for tensor in part.mapped(name)]


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """Return the number of rows of the embedding, or -1 if it is missing."""
    name = "tok_embeddings.weight"
    shapes = [part.shapes.get(name, ()) for part in checkpoint.parts]
    if not shapes[0]:
        return -1
    by_rows = stored_dim(name, shapes, checkpoint.params.get("dim")) == 0
    return sum(shape[0] for shape in shapes) if by_rows else shapes[0][0]


def text_files(directory: Path) -> dict[str, Path]:
    """Return the files of a directory that concern text, by name."""
    paths = {name: directory / name for name in _TEXT_FILES}
    paths |= {f"{TEMPLATES}/{path.name}": path for path in directory.glob(f"{TEMPLATES}/*.jinja")}
    return {name: path for name, path in paths.items() if path.is_file()}


def replace_tokenizer(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Return the checkpoint with another tokenizer, a ``tokenizer.model`` or ``tokenizer.json``.

    Raises:
        FileNotFoundError: ``path`` doesn't exist.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}: give the path of a tokenizer.model or tokenizer.json"
        )
    name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
    others = {
        key: file
        for key, file in checkpoint.files.items()
        if key not in ("tokenizer.model", "tokenizer.json")
    }
    return replace(checkpoint, files={**others, name: path})


def quantized(
    source: Checkpoint,
    args: ModelArgs,
    scheme: Scheme,
    progress: Callable[[int], None] = lambda _: None,
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """Return a checkpoint whose weights are quantised, one at a time, when they are read.

    Each rank reads and rounds its own part, to the codes and scales that the whole weight has. All
    of them have to read the same parts in the same order. Weights that are quantised already are
    rounded a second time, unless the scheme is theirs.

    Args:
        source: a checkpoint.
        args: its hyper-parameters (``make_args``).
        scheme: the scheme to quantise with.
        progress: called with the number of weights that have been quantised, on all ranks.
        device: where to round them.

    Raises:
        ValueError: a weight isn't finite, or a width isn't a multiple of the group size.
    """
    forms = scheme.forms(args)
    if source.forms == forms:
        return source
    if source.forms:
        logger.warning(
            "%s is quantised, and its weights are rounded a second time: without quantize= they "
            "are used as they are, and the original weights would give a better result",
            source.names[0],
        )
        source = widened(source, args)
    _check_widths(source, args, scheme.form)
    sizes = {name: prod(shape) for name, shape in full_shapes(args).items()}
    # The parts of a stored weight are read one after another: it is quantised once for all.
    last: tuple[str, int, int] = ("", 0, 0)
    stored: StoredWeight = {}
    done = 0

    def read_part(name: str, rank: int, ranks: int) -> torch.Tensor:
        nonlocal last, stored, done
        module, part = name.rsplit(".", 1)
        is_tied = module == "output" and args.tie_word_embeddings
        form = forms.get("tok_embeddings") if is_tied else form_of(forms, name)
        if form is None:
            return source.rank_part(name, args, rank, ranks)
        if (module, rank, ranks) != last:
            stored = {}
            weight = source.rank_part(f"{module}.weight", args, rank, ranks).to(device)
            stored = _quantize_part(f"{module}.weight", weight, ranks, source.names[0], form)
            last = (module, rank, ranks)
            release(source.mapped(f"{module}.weight"))
            trim()  # the temporary tensors of the rounding
            done += sizes.get(f"{module}.weight", 0)
            progress(done)
        return stored[part]

    def mapped(name: str) -> Sequence[torch.Tensor]:
        return () if form_of(forms, name) else source.mapped(name)

    parts = [Weights(full_shapes(args, forms), lambda name: read_part(name, 0, 1), mapped)]
    return replace(
        source,
        parts=parts,
        names=source.names[:1],
        in_float32=False,
        forms=forms,
        read_part=read_part,
    )


def chosen_scheme(source: Checkpoint, name: str, group_size: int | None = None) -> Scheme:
    """Return the scheme that a caller names for a checkpoint, whose own group size is the default.

    Raises:
        ValueError: there is none of that name or group size.
    """
    own = set(source.forms.values())
    if name == "int4" and group_size is None and len(own) == 1:
        [form] = own
        if isinstance(form, Grouped) and is_made_here(form):
            group_size = form.group_size
    return make_scheme(name, group_size)


def widened(source: Checkpoint, args: ModelArgs) -> Checkpoint:
    """Return a checkpoint whose quantised weights are made in float32 when they are read.

    Raises:
        ValueError: the checkpoint isn't of the network of ``args``.
    """
    if not source.forms:
        return source
    source.check(args)  # of what is made here any check would find that it is right
    shapes = full_shapes(args)

    def read(name: str) -> torch.Tensor:
        form = form_of(source.forms, name)
        if form is None:
            return source.rank_part(name, args, 0, 1)
        module = name.removesuffix(".weight")
        names = {part: f"{module}.{part}" for part in form.dtypes()}
        stored = {part: source.rank_part(full, args, 0, 1) for part, full in names.items()}
        return form.dequantize(stored, form.block_size(shapes[name][1]))

    def mapped(name: str) -> Sequence[torch.Tensor]:
        form = form_of(source.forms, name)
        module = name.removesuffix(".weight")
        names = [name] if form is None else [f"{module}.{part}" for part in form.dtypes()]
        return [tensor for name in names for tensor in source.mapped(name)]

    parts = [Weights(shapes, read, mapped)]
    names = source.names[:1]
    return replace(source, parts=parts, names=names, in_float32=True, forms={}, read_part=None)


def _check_widths(source: Checkpoint, args: ModelArgs, form: Form) -> None:
    """Raise ``ValueError`` unless a checkpoint's weights can have a form."""
    source.check(args)
    indivisible = sorted(w for w in input_widths(args) if w % form.block_size(w))
    if indivisible:
        raise ValueError(
            f"{form.name} doesn't fit {source.source}, where a weight's width is {indivisible[0]}: "
            "give a group_size that divides it, or use int8"
        )


def _quantize_part(
    name: str, weight: torch.Tensor, ranks: int, file: str, form: Form
) -> StoredWeight:
    """Round one of ``ranks`` parts of a weight as a part of the whole."""
    is_finite = all(bool(rows.abs().amax() < torch.inf) for rows in weight.split(256))
    if ranks > 1:  # all of them raise the error, and none waits for one that has
        failed = torch.tensor([not is_finite], dtype=torch.float32, device=weight.device)
        is_finite = not parallel.max_over_ranks(failed)
    if not is_finite:
        raise ValueError(f"{name} in {file} isn't finite")
    if ranks == 1 or split_dim(name) == 0:  # of which a rank has whole rows
        return round_weight(form, weight)
    block = form.block_size(weight.shape[1] * ranks)
    return round_weight(form, weight, block, parallel.max_over_ranks)


def check_shapes(
    parts: Sequence[Mapping[str, Shape]],
    args: ModelArgs,
    names: Sequence[str],
    source: str,
    forms: Forms | None = None,
) -> None:
    """Raise ``ValueError`` unless tensors of these shapes make the network of ``args``.

    Args:
        parts: the shapes by tensor name, one mapping a part.
        args: the hyper-parameters.
        names: the parts' names in errors.
        source: the file that the hyper-parameters come from, for errors.
        forms: the forms of quantised weights by module.
    """
    size = sum(prod(shape) for part in parts for shape in part.values())
    count = parameter_count(args)
    if count > 4 * size:  # before allocating anything of the size in the hyper-parameters
        raise ValueError(
            f"{source} describes {count:,} parameters, but {', '.join(names[:2])} hold"
            f"{'s' * (len(names) == 1)} {size:,}: one of them belongs to another model"
        )
    _check_forms(args, source, forms or {})
    expected = full_shapes(args, forms or {})
    for name, part in zip(names, parts, strict=True):
        for problem, keys in (
            ("lacks", sorted(expected.keys() - part.keys())),
            ("has the unexpected", sorted(part.keys() - expected.keys())),
        ):
            if keys:
                raise ValueError(f"{name} {problem} {listed([printable(key) for key in keys])}")
    for key, shape in expected.items():
        pieces = [part[key] for part in parts]
        joined = joined_shape(key, distinct_pieces(key, pieces, args), args)
        if joined != shape:
            raise ValueError(
                f"{key} in {names[0]} has the shape {joined or pieces[0]}, but {source} and the "
                f"tokenizer make it {shape}"
            )


def _check_forms(args: ModelArgs, source: str, forms: Forms) -> None:
    """Raise ``ValueError`` unless the network's weights can have forms."""
    shapes = full_shapes(args)
    for module, form in forms.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            continue  # of which the file has unexpected tensors
        size = form.group_size if isinstance(form, Grouped) else 0
        if len(shape) != 2 or shape[1] % (size or 1):
            raise ValueError(
                f"{module}.weight of shape {shape} is quantised in {source}"
                f"{f' in groups of {size}' * (size > 0)}: expected a matrix whose width they "
                "divide; convert the weights again"
            )
