"""``quantize=`` on several ranks: each rounds its own part, to the whole weight's codes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from processes import forked, script

from llama.checkpoint.base import Checkpoint, Weights, quantized, widened
from llama.checkpoint.forms import forms_params, read_forms
from llama.checkpoint.load import load
from llama.checkpoint.meta import open_meta
from llama.checkpoint.rounding import Scheme, make_scheme, round_weight
from llama.checkpoint.save import save
from llama.checkpoint.sharding import form_of, full_shapes
from llama.convert import convert
from llama.generation import TINY
from llama.layers.batch import Segment
from llama.layers.linear import ParallelEmbedding
from llama.layers.quantization import Form, Grouped, Rotated

# Each rank compares what it rounded with its part of the converted checkpoint.
COMPARE = """
import json, sys, torch
from llama import Llama, parallel
from llama.checkpoint import base
read = []
def counted(scheme, weight, *more, usual=base.round_weight):
    read.append(weight.numel())
    return usual(scheme, weight, *more)
base.round_weight = counted
def build(path, **more):
    return Llama.build(path, dtype=torch.float32, device="cpu", **more).model
found = []
for path, options, converted in json.loads(sys.argv[1]):
    read.clear()
    ours, theirs = build(path, **options).state_dict(), build(converted).state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, (path, options, different)
    found.append(sum(read))
try:
    build(sys.argv[2], quantize="int8")
except ValueError as error:
    found.append(str(error))
with open(sys.argv[3] + str(parallel.rank()), "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_ranks_hold_the_parts_of_what_convert_writes(tmp_path: Path) -> None:
    """A failure means that several ranks compute with other weights, or round all of them."""
    shapes = {"gqa": {"dim": 192, "n_kv_heads": 2}, "mqa": {"n_kv_heads": 1, "dim": 128}}
    shapes["tied"] = {"tie_word_embeddings": True, "dim": 128, "n_kv_heads": 4}
    cases, counts = [], []
    for name, params in shapes.items():
        model = make_model(vocab_size=768, multiple_of=64, **params)
        files = {"tokenizer.model": TINY / "tokenizer.model"}
        path = tmp_path / name
        save([model.state_dict()], model.params, path, files=files, dtype=torch.bfloat16)
        for options in ({"quantize": "int8"}, {"quantize": "int4", "group_size": 32}):
            converted = tmp_path / f"{name}-{options['quantize']}"
            convert(str(path), str(converted), **options)
            cases.append((str(path), options, str(converted)))
            scheme = make_scheme(options["quantize"], options.get("group_size"))
            weights = model.state_dict().items()
            counts.append(
                sum(w.numel() for n, w in weights if scheme.applies_to(n.rpartition(".")[0]))
            )
    tensors = model.state_dict()
    tensors["layers.1.feed_forward.w2.weight"][3, -1] = math.nan  # in the second rank's part
    del tensors["output.weight"]
    save([tensors], model.params, tmp_path / "nan", files=files)
    job = script(tmp_path, COMPARE)
    out = str(tmp_path / "rank")
    done = forked(job, json.dumps(cases), str(tmp_path / "nan"), out, n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        *read, error = json.loads(Path(f"{out}{rank}").read_text())
        assert "layers.1.feed_forward.w2.weight in" in error and "isn't finite" in error
        for count, whole in zip(read, counts, strict=True):
            assert count == pytest.approx(whole / 2, rel=0.1)  # a lone key/value head is copied


@pytest.mark.parametrize("form", [Rotated(), Grouped(group_size=32)], ids=str)
def test_weights_are_rounded_on_the_device_that_is_named(form: Form) -> None:
    """A failure means that a GPU waits while one thread of the CPU rounds."""
    model = make_model(dim=128)
    weights = {name: part.detach() for name, part in model.named_parameters()}
    source = Checkpoint("test", {}, [Weights.of(weights)], ["test"], torch.float32)
    stored = round_weight(form, torch.empty(64, 128, device="meta"))
    assert {part.device.type for part in stored.values()} == {"meta"}
    done: list[int] = []
    result = quantized(source, model.params, Scheme(form), done.append, torch.device("cpu"))
    for name in result.parts[0]:
        assert torch.equal(result.rank_part(name, model.params, 0, 1), result.parts[0][name])
    assert done[-1] > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", [Rotated(), Grouped(group_size=32)], ids=str)
def test_loading_changes_no_checkpoint_in_memory(form: Form, tied: bool) -> None:
    """A failure means that what is loaded or saved after it has scrambled weights."""
    args = make_model(dim=128, vocab_size=768, multiple_of=64, tie_word_embeddings=tied).params
    weights = {name: torch.randn(shape) for name, shape in full_shapes(args).items()}
    source = Checkpoint("test", {}, [Weights.of(weights)], ["test"], torch.float32)
    rounded = quantized(source, args, Scheme(form), lambda count: None)
    tensors = dict(rounded.parts[0])
    before = {name: part.clone() for name, part in tensors.items()}
    whole = replace(rounded, parts=[Weights.of(tensors)], read_part=None)
    tokens, found = torch.arange(9), []
    for _ in range(2):
        network = load(whole, args, torch.device("cpu"), torch.bfloat16)
        found.append(network.forward_ragged(tokens, [Segment(0, 0, len(tokens))]))
    assert torch.equal(*found)
    assert all(torch.equal(part, before[name]) for name, part in tensors.items())


ORDERED = Grouped("int4", 32, False, torch.float16, True)


def ordered(**changes: torch.Tensor) -> tuple[dict[str, torch.Tensor], Checkpoint]:
    """The tensors of a network with one ordered weight, some of them changed; its checkpoint."""
    args = make_model(n_layers=1).params
    forms = {"layers.0.attention.wq": ORDERED}
    tensors = {}
    for name, shape in full_shapes(args, forms).items():
        form = form_of(forms, name)
        dtype = form.dtypes()[name.rpartition(".")[2]] if form else torch.float32
        tensors[name] = torch.ones(shape).to(dtype)
    tensors["layers.0.attention.wq.order"] = torch.arange(args.dim, dtype=torch.int32)
    tensors |= {f"layers.0.attention.wq.{part}": tensor for part, tensor in changes.items()}
    parts = [Weights.of(tensors)]
    return tensors, Checkpoint("x", {}, parts, ["file"], torch.float16, forms=forms)


def test_parts_that_do_not_fit_are_named_before_they_are_widened() -> None:
    """A failure means that quantize= of a damaged file fails without saying what is wrong."""
    args = make_model(n_layers=1).params
    _, checkpoint = ordered(scales=torch.ones(3, 1, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"wq\.scales in file has the shape \(3, 1\)"):
        widened(checkpoint, args)


@pytest.mark.parametrize("wrong", [-1, 1, 1 << 20])
def test_an_order_has_each_input_once(wrong: int, tmp_path: Path) -> None:
    """A failure means that a file's order reads memory that isn't the weight's."""
    args = make_model(n_layers=1).params
    tensors, checkpoint = ordered()
    save([tensors], args, tmp_path / "model", forms=checkpoint.forms)
    assert open_meta(tmp_path / "model").forms == checkpoint.forms
    tensors["layers.0.attention.wq.order"][0] = wrong
    torch.save(tensors, tmp_path / "model" / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"wq\.order in .* doesn't have each number from 0 to"):
        open_meta(tmp_path / "model")


def test_an_embedding_has_its_columns_in_an_order() -> None:
    """A failure means that a token gets another row than the embedding has for it."""
    layer = ParallelEmbedding(10, 64)
    layer.quantize(ORDERED, torch.float32)
    stored = {
        "weight": torch.randint(0, 256, (10, 32), dtype=torch.uint8),
        "scales": torch.rand(10, 2).half(),
        "order": torch.randperm(64, dtype=torch.int32),
    }
    layer.load_state_dict(stored)
    tokens = torch.tensor([3, 9, 3])
    assert torch.equal(layer(tokens), ORDERED.dequantize(stored)[tokens])


@pytest.mark.parametrize("codes", ["int4", "int8", "float8"])
@pytest.mark.parametrize("size", [0, 16, 32, 256])
def test_a_description_of_any_form_is_read_back(codes: str, size: int) -> None:
    """A failure means that a model is saved, and its checkpoint refused."""
    for has_zeros in (False, True):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            form = Grouped(codes, size, has_zeros, dtype)
            found = forms_params({"output": form}, ["output", "layers.0.attention.wq"])
            assert read_forms(found, ["output.weight"], "params.json") == {"output": form}
