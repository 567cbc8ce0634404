"""The served model in words and numbers, for people and clients that choose by them."""

from collections import Counter
from pathlib import Path

from llama.args import ModelArgs
from llama.checkpoint.folders import Folder
from llama.checkpoint.sharding import parameter_count
from llama.generation import Llama
from llama.layers.linear import ParallelLinear
from llama.layers.quantization import Form, Grouped
from llama.server import schemas
from llama.server.schemas_chat import MAX_TOP_LOGPROBS
from llama.server.service import Service

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_BITS = {"int4": "4 bits", "int8": "8 bits", "float8": "float8"}


def model_meta(service: Service) -> schemas.ModelMeta:
    """Return what ``/v1/models`` says about the served model and its adapters."""
    llama = service.llama
    args = llama.model.params
    is_guarded = bool(llama.input_guard or llama.output_guard)
    return schemas.ModelMeta(
        description=_description(args),
        chat_format=service.chat_format,
        precision=_precision(llama, Path(service.config.ckpt_dir)),
        n_params=parameter_count(args),
        infills=service.infills and args.labels is None,
        chats=args.labels is None,
        tools=llama.chat.notation is not None,
        top_logprobs=0 if is_guarded else MAX_TOP_LOGPROBS,
        sampling={name: getattr(service.defaults, name) for name in _SAMPLING},
    )


def _description(args: ModelArgs) -> str:
    n = parameter_count(args)
    unit, name = next(((u, w) for u, w in ((1e9, "billion"), (1e6, "million")) if n >= u), (1, ""))
    number = f"{n:,}" if not name else f"{n / unit:.3g}" if n / unit >= 100 else f"{n / unit:.1f}"
    kind = "Llama" if args.labels is None else f"Llama, classifier of {len(args.labels)} labels"
    return f"{kind}, {' '.join(filter(None, (number, name)))} parameters"


def _precision(llama: Llama, path: Path) -> str:
    """Return how the weights are stored, the form of most of them first."""
    sizes: Counter[Form | None] = Counter()
    for layer in llama.model.modules():
        if isinstance(layer, ParallelLinear):
            sizes[layer.form] += layer.in_features * layer.out_features
    dtype = str(llama.model.tok_embeddings.dtype).removeprefix("torch.")
    names = dict.fromkeys(_form_name(form, dtype) for form, _ in sizes.most_common())
    source = ", of a GGUF file" if any(sizes) and _is_gguf(path) else ""
    return ", some ".join(names) + source


def _form_name(form: Form | None, dtype: str) -> str:
    if form is None:
        return dtype
    size = form.group_size if isinstance(form, Grouped) else 0
    return _BITS[form.name] + f" in groups of {size}" * bool(size)


def _is_gguf(path: Path) -> bool:
    files = Folder(path).weights if path.is_dir() else [path]
    return any(file.suffix == ".gguf" for file in files)
