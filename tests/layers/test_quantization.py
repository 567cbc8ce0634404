"""Weights of eight and four bits: the same network, within what rounding does to it."""

import copy
import gc
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import make_model
from processes import forked, script
from safetensors.torch import save_file

from llama import Llama, cli
from llama.checkpoint import base
from llama.checkpoint.base import Checkpoint, Weights, quantized
from llama.checkpoint.load import load
from llama.checkpoint.rounding import Scheme, make_scheme, round_weight
from llama.checkpoint.save import reshard
from llama.checkpoint.sharding import full_shapes, parameter_count, stored_bytes
from llama.convert import convert
from llama.generation import TINY
from llama.layers.capability import Capability
from llama.layers.kernels import compiled, cpu, groups, make_kernel
from llama.layers.linear import ParallelEmbedding, ParallelLinear, pack
from llama.layers.quantization import Form, Grouped, Rotated, hadamard, rotate
from llama.perplexity import main

# Inputs have fewer levels on processors without VNNI, and a rounding error as much larger.
INT8_ERROR = 1.2e-2 * 127 / cpu.LEVELS
FORMS: list[Form] = [Rotated(), Grouped(group_size=32), Grouped(group_size=64)]


def quantised_model(form: Form, dtype: torch.dtype = torch.float32, **params: object):
    """A network with random weights, and its quantised form."""
    model = make_model(**{"dim": 128, "n_kv_heads": 2, "multiple_of": 64, **params})
    args = model.params
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if args.tie_word_embeddings:
        del weights["output.weight"]
    source = Checkpoint("test", {}, [Weights.of(weights)], ["test"], torch.float32)
    device = torch.device("cpu")
    return model, load(quantized(source, args, Scheme(form)), args, device, dtype)


@pytest.mark.parametrize("size", [1, 2, 32, 64])
def test_the_hadamard_matrix_is_its_own_inverse(size: int) -> None:
    matrix = hadamard(size, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))
    assert matrix.abs().unique().numel() == 1  # every input counts for every output alike


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_within_half_a_step(form: Form) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = round_weight(form, weight)
    assert {name: part.dtype for name, part in parts.items()} == form.dtypes()
    assert {name: tuple(part.shape) for name, part in parts.items()} == form.shapes(48, 128)
    back = form.dequantize(parts, form.block_size(128))
    if isinstance(form, Rotated):
        matrix = hadamard(form.block_size(128), weight.device, torch.float32)
        off = (rotate(back - weight.float(), matrix) / parts["scale"]).abs()
        assert off.max() <= 0.5 + 1e-3
    error = (back - weight.float()).square().mean().item()
    # What an even spread over 255, or 15, steps between the ends costs at least is known.
    assert error < {"int8": 1.1e-4, "int4": 0.0072}[form.name]


def test_four_bits_are_better_than_rounding_to_nearest() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    groups = weight.unflatten(1, (-1, 64))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    nearest = ((groups - low) / step).round() * step + low
    worst = (nearest - groups).square().mean()
    form = Grouped(group_size=64)
    ours = (form.dequantize(round_weight(form, weight), 1) - weight).square().mean()
    assert ours < 0.87 * worst


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_that_are_all_the_same_or_nothing_stay_so(form: Form) -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 0.5
    weight[2] = -3.0
    weight[3, 7] = 1e-20
    back = form.dequantize(round_weight(form, weight), form.block_size(64))
    torch.testing.assert_close(back, weight, atol=1e-6, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["quick", "plain"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_modules_equal_their_dequantised_form(
    form: Form, kernel: str, dtype: torch.dtype, monkeypatch
) -> None:
    """Every kernel of PyTorch's operators, every module, few rows and many, against float32."""
    for module in (compiled, cpu, groups):
        monkeypatch.setattr(module, "has_numba", lambda: False)
    if kernel == "plain":
        monkeypatch.setattr(cpu, "HAS_FBGEMM", False)
        monkeypatch.setattr(cpu, "int4_tile", lambda: 0)
    _, model = quantised_model(form, dtype)
    generator = torch.Generator().manual_seed(3)
    layers = [m for m in model.modules() if isinstance(m, ParallelLinear) and m.form]
    assert len(layers) == 2 * 7 + isinstance(form, Grouped)  # whose output is quantised too
    # Inputs of eight bits are off by half a step of 127, which a sum over many evens out.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    if kernel == "quick":  # int4's few rows are products of bfloat16
        tolerance = max(tolerance, INT8_ERROR if isinstance(form, Rotated) else 5e-3)
    for layer in layers:
        exact = layer.plain_weight()
        assert exact.shape[1] == layer.in_features
        for rows in (1, 2, 5, 130):
            x = torch.randn(rows, layer.in_features, generator=generator).to(dtype)
            out, expected = layer(x), x.float() @ exact.T
            assert out.dtype == dtype
            assert out.shape == expected.shape
            error = (out.float() - expected).norm() / expected.norm()
            assert error < tolerance, (rows, error)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_embeddings_equal_their_dequantised_form(form: Form) -> None:
    usual, model = quantised_model(form)
    if isinstance(form, Rotated):  # which leaves the embedding as it is
        assert torch.equal(model.tok_embeddings.weight, usual.tok_embeddings.weight)
        return
    rows = model.tok_embeddings(torch.tensor([5, 0, 95]))
    whole = form.dequantize(model.tok_embeddings.stored(), form.block_size(rows.shape[1]))
    torch.testing.assert_close(rows, whole[[5, 0, 95]])
    error = (whole - usual.tok_embeddings.weight).norm() / usual.tok_embeddings.weight.norm()
    assert error < 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_network_is_that_of_the_dequantised_weights(
    form: Form, tied: bool, monkeypatch
) -> None:
    usual, model = quantised_model(form, tie_word_embeddings=tied)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, ParallelLinear) and module.form:
                usual.get_submodule(name).weight.copy_(module.plain_weight())
        embedding = model.tok_embeddings.stored()
        if isinstance(form, Grouped):
            usual.tok_embeddings.weight.copy_(form.dequantize(embedding, 1))
    if tied and isinstance(form, Grouped):  # one table for both
        torch.testing.assert_close(model.output.plain_weight(), usual.tok_embeddings.weight)
    if tied and isinstance(form, Rotated):
        assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    if tied:
        usual.output.weight = usual.tok_embeddings.weight
    usual.allocate_buffers(torch.device("cpu"), torch.float32)
    tokens = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(4))
    expected, found = usual.forward(tokens), model.forward(tokens)
    error = (found - expected).norm() / expected.norm()
    assert error < (5 * INT8_ERROR if isinstance(form, Rotated) else 1e-4)


PRODUCT = """
import torch
from llama.checkpoint.rounding import round_weight
from llama.layers.capability import Capability
from llama.layers.kernels import make_kernel
from llama.layers.quantization import Grouped
form = Grouped(group_size=32)
generator = torch.Generator().manual_seed(0)
weight, x = (torch.randn(n, 64, generator=generator) for n in (96, 3))
parts = round_weight(form, weight)
kernel = make_kernel(parts, form, torch.float32, 1, Capability())
expected = x @ form.dequantize(parts, 1).T
print(type(kernel).__module__, float((kernel(x) - expected).norm() / expected.norm()) < 5e-3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_int4_is_right_on_processors_with_another_order(capability: str) -> None:
    """Without vectors PyTorch's kernel orders numbers in a third way, which none of ours is."""
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    name, right = done.stdout.split()
    assert right == "True"
    assert name == "llama.layers.kernels.plain" or capability != "default"


@pytest.mark.parametrize("form", [Rotated(), Grouped(group_size=32)], ids=str)
def test_compiled_code_is_told_the_products_true_layout(form: Form) -> None:
    weight = torch.randn(96, 64)  # no multiple of int4's tile
    dtype = torch.float32 if isinstance(form, Rotated) else torch.bfloat16
    stored = round_weight(form, weight)
    kernel = make_kernel(stored, form, dtype, form.block_size(64), Capability())
    x = torch.randn(2, 64, dtype=dtype)
    number = torch.tensor(kernel.number)
    torch.library.opcheck(torch.ops.llama.product.default, (x, number, kernel.out_features))


@pytest.mark.parametrize("width", [1, 2, 341, 96, 576, 4096, 11008])
def test_blocks_divide_every_width(width: int) -> None:
    block = Rotated().block_size(width)
    assert width % block == 0
    assert width % 2 or width // 2 % block == 0  # so that two ranks can share it
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    back = Rotated().dequantize(round_weight(Rotated(), weight), block)
    assert (back - weight).norm() / weight.norm() < 0.012


def test_int8_products_do_not_depend_on_other_tokens() -> None:
    _, model = quantised_model(Rotated())
    layer = model.layers[0].feed_forward.w1
    x = torch.randn(40, 128) * torch.logspace(-3, 3, 40)[:, None]
    together = layer(x)
    for row in (0, 17, 39):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_an_input_of_zeros_gives_zeros_and_not_a_number_stays_one() -> None:
    _, model = quantised_model(Rotated())
    layer = model.layers[0].attention.wo
    assert torch.equal(layer(torch.zeros(1, 128)), torch.zeros(1, 128))
    assert layer(torch.full((1, 128), math.nan)).isnan().all()
    assert not layer(torch.full((1, 128), math.inf)).isfinite().any()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layers_can_be_saved_loaded_copied_and_pickled(form: Form) -> None:
    _, model = quantised_model(form, attention_bias=True)
    x = torch.randn(3, 128)
    layer = model.layers[0].attention.wk  # the middle one of three that are packed together
    assert layer.kernel is not None
    expected = layer(x)
    state = model.state_dict()
    assert state["layers.0.attention.wk.weight"].dtype == form.dtypes()["weight"]
    assert set(state) == set(full_shapes(model.params, Scheme(form).forms(model.params)))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.kernel is None
        assert all(torch.equal(twin.stored()[n], part) for n, part in layer.stored().items())
        pack([twin], Capability())
        torch.testing.assert_close(twin(x), expected)  # oneDNN adds up by the number of rows
    _, other = quantised_model(form, seed=9, attention_bias=True)
    other.load_state_dict(state)
    assert torch.equal(other.layers[0].attention.wk(x), expected)
    tokens = torch.tensor([[3, 1, 4]])
    torch.testing.assert_close(other.forward(tokens), model.forward(tokens))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_copied_model_computes_with_the_same_kernels(form: Form) -> None:
    """A failure means that copies, as other processes get them, are slow or give other logits."""
    _, model = quantised_model(form)
    tokens = torch.tensor([[3, 1, 4]])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # our own bytes
        assert type(twin.layers[0].attention.wk.kernel) is type(model.layers[0].attention.wk.kernel)
        assert torch.equal(twin.forward(tokens), model.forward(tokens))


def test_packed_weights_go_with_their_layers() -> None:
    _, model = quantised_model(Rotated())
    kernel = weakref.ref(model.layers[0].attention.wk.kernel)
    attention = model.layers[0].attention
    del model
    gc.collect()
    assert kernel() is not None
    del attention
    gc.collect()
    assert kernel() is None


def test_every_layer_is_quantised_and_no_weight_is_there_twice() -> None:
    _, model = quantised_model(Grouped(group_size=32))
    stored = (ParallelLinear, ParallelEmbedding)
    assert all(module.form for module in model.modules() if isinstance(module, stored))
    for layers in model.linear_groups():
        assert len({id(layer.kernel) for layer in layers}) == 1  # one product for all
        assert sum(p.numel() for layer in layers for p in layer.parameters()) == 0


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_converted_checkpoint_is_what_build_quantises(quantize: str, tmp_path: Path) -> None:
    convert(str(TINY), str(tmp_path / "out"), quantize=quantize)
    built = Llama.build(dtype=torch.float32, quantize=quantize)
    loaded = Llama.build(tmp_path / "out", dtype=torch.float32)
    said = json.loads((tmp_path / "out" / "params.json").read_text())["quantization"]
    assert said["format"] == {"int8": "int8", "int4": "mixed"}[quantize]
    prompt = [[1, 40, 50, 60]]
    ours = built.generate(prompt, 20, temperature=0, logprobs=True)
    assert loaded.generate(prompt, 20, temperature=0, logprobs=True) == ours
    size = (tmp_path / "out" / "consolidated.00.pth").stat().st_size
    stored = stored_bytes(
        loaded.model.params, torch.bfloat16, make_scheme(quantize).forms(loaded.model.params)
    )
    assert stored < size < stored + 50_000  # names and alignment
    assert stored * 8 / parameter_count(loaded.model.params) < {"int8": 9.4, "int4": 5.1}[quantize]
    again = Llama.build(tmp_path / "out", dtype=torch.float32, quantize=quantize)
    assert again.generate(prompt, 20, temperature=0, logprobs=True) == ours


GENERATE = """
import json, sys, torch
from llama import Llama
paths = sys.argv[2:]
found = []
for path in paths:
    llama = Llama.build(path, dtype=torch.float32, device="cpu")
    found.append(llama.generate([[1, 40, 50, 60], [1, 9]], 12, temperature=0, logprobs=True))
import torch.distributed as dist
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_quantised_checkpoints_on_two_processes_and_in_two_files(tmp_path: Path) -> None:
    paths = []
    for quantize, group_size in (("int8", None), ("int4", 32)):
        for files in (1, 2):
            path = tmp_path / f"{quantize}-{files}"
            convert(
                str(TINY),
                str(path),
                model_parallel_size=files,
                quantize=quantize,
                group_size=group_size,
            )
            paths.append(path)
        reshard(str(path), str(tmp_path / f"{quantize}-again"), 1)
        first = torch.load(tmp_path / f"{quantize}-1" / "consolidated.00.pth", weights_only=True)
        again = torch.load(
            tmp_path / f"{quantize}-again" / "consolidated.00.pth", weights_only=True
        )
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
    out = tmp_path / "found.json"
    done = forked(script(tmp_path, GENERATE), str(out), *map(str, paths), n=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for path, (tokens, logprobs) in zip(paths, found, strict=True):
        llama = Llama.build(path, dtype=torch.float32, device="cpu")
        alone, scores = llama.generate([[1, 40, 50, 60], [1, 9]], 12, temperature=0, logprobs=True)
        assert tokens == alone
        # Each rank rounds its part of an input to eight bits by that part's range, and what it
        # adds in int4 to bfloat16.
        tolerance = 0.15
        for ours, theirs in zip(logprobs, scores, strict=True):
            assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, converted."""
    path = tmp_path_factory.mktemp("converted") / "int8"
    convert(str(TINY), str(path), quantize="int8")
    return path


def test_each_weight_is_rounded_once_and_progress_ends_at_all(tmp_path: Path, capsys) -> None:
    calls = []

    def counted(form: Form, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(weight.shape)
        return round_weight(form, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "round_weight", counted)
        patch.setattr(sys.stderr, "isatty", lambda: True)
        patch.setattr(cli, "DELAY", 0)
        convert(str(TINY), str(tmp_path / "out"), model_parallel_size=2, quantize="int8")
    assert len(calls) == 4 * 7
    assert "quantising: 100%" in capsys.readouterr().err  # those of the layers


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's memory is part of a mapped checkpoint."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system doesn't list what is mapped")
    lines = [line.split() for line in maps.read_text().splitlines() if ".pth" in line]
    bounds = [[int(address, 16) for address in line[0].split("-")] for line in lines]
    return any(low <= tensor.data_ptr() < high for low, high in bounds)


def test_what_stays_as_it_is_stays_mapped() -> None:
    llama = Llama.build(dtype=torch.bfloat16, device="cpu", quantize="int8")
    output = llama.model.output
    stored = output.weight if output.kernel is None else output.kernel.stored()["weight"]
    assert is_mapped(llama.model.tok_embeddings.weight)
    assert is_mapped(stored) or output.kernel is not None  # whose order is its own


def test_a_checkpoints_own_groups_are_meant_unless_others_are_named(tmp_path: Path) -> None:
    convert(str(TINY), str(tmp_path / "out"), quantize="int4", group_size=32)
    llama = Llama.build(tmp_path / "out", quantize="int4")
    assert llama.model.layers[0].attention.wq.form == Grouped(group_size=32)
    llama = Llama.build(tmp_path / "out", quantize="int4", group_size=64)
    assert llama.model.layers[0].attention.wq.form == Grouped(group_size=64)


def test_another_scheme_rounds_a_second_time_and_says_so(int8: Path, caplog) -> None:
    """A quantised file that is rounded again without a word gives worse text than it could."""
    once = Llama.build(quantize="int4", dtype=torch.float32)
    twice = Llama.build(int8, quantize="int4", dtype=torch.float32)
    assert "rounded a second time" in caplog.text
    assert twice.model.output.form == once.model.output.form
    tokens = torch.tensor([[1, 300, 301, 302]])
    found, expected = twice.model(tokens), once.model(tokens)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()


def test_quantised_weights_are_widened_on_request(int8: Path, tmp_path: Path) -> None:
    """Other programs, and exact comparisons, need the numbers that codes stand for."""
    quantised = Llama.build(int8, dtype=torch.float32)
    plain = Llama.build(int8, quantize="none", dtype=torch.float32)
    assert quantised.model.forms and not plain.model.forms
    layer = plain.model.layers[1].feed_forward.w2
    assert torch.equal(layer.weight, quantised.model.layers[1].feed_forward.w2.plain_weight())
    convert(str(int8), str(tmp_path / "hf"), to="hf", dtype="float32")
    saved = Llama.build(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(saved.model.layers[1].feed_forward.w2.weight, layer.weight)


def test_an_adapter_is_merged_before_and_refused_after(int8: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="merge it into the original weights"):
        Llama.build(int8, adapter=tmp_path)


def test_commands_take_the_scheme(int8: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cow. The cow said moo. " * 20)
    found = []
    for path, quantize in ((str(TINY), None), (str(TINY), "int8"), (str(int8), None)):
        main(path, str(text), 64, 32, dtype="float32", quantize=quantize)
        found.append(float(capsys.readouterr().out.split()[1]))
    assert found[1] == found[2] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.05)


class TestErrors:
    def test_an_unknown_scheme(self) -> None:
        with pytest.raises(ValueError, match="expected 'int8', 'int4' or 'none'"):
            Llama.build(quantize="int3")

    @pytest.mark.parametrize("arguments", [{}, {"quantize": "int8"}])
    def test_a_group_size_without_int4(self, arguments: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="group_size is for"):
            Llama.build(group_size=32, **arguments)

    @pytest.mark.parametrize("group_size", [0, 33, 512, "64", 64.0, True])
    def test_a_group_size_that_no_kernel_has(self, group_size: object) -> None:
        with pytest.raises(ValueError, match="expected one of 32, 64, 128, 256"):
            make_scheme("int4", group_size)

    def test_a_group_that_no_width_is_a_multiple_of(self) -> None:
        with pytest.raises(ValueError, match="a weight's width is 192: give a group_size"):
            Llama.build(quantize="int4", group_size=128)

    def test_ranks_that_would_cut_a_group(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="in int4 blocks of 64: possible are 1"):
            convert(str(TINY), str(tmp_path / "out"), model_parallel_size=2, quantize="int4")
        assert not (tmp_path / "out").exists()

    def test_weights_that_are_not_numbers(self, checkpoint_dir) -> None:
        path = checkpoint_dir()
        tensors = torch.load(path / "consolidated.00.pth", weights_only=True)
        tensors["layers.1.attention.wo.weight"][3, 4] = math.nan
        torch.save(tensors, path / "consolidated.00.pth")
        with pytest.raises(ValueError, match=r"layers.1.attention.wo.weight in .* isn't finite"):
            Llama.build(path, quantize="int8")

    @pytest.fixture
    def int8(self, int8: Path, tmp_path: Path) -> Path:
        """A copy to change."""
        return Path(shutil.copytree(int8, tmp_path / "int8"))

    def test_hugging_face_layout(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="leave it out with --to hf"):
            convert(str(TINY), str(tmp_path / "out"), to="hf", quantize="int8")

    @pytest.mark.parametrize(
        "said", [{"format": "nf4"}, {"format": "int4", "group_size": 7}, "int8", {}, {"bits": 8}]
    )
    def test_a_file_of_another_version(self, int8: Path, said: object) -> None:
        params = json.loads((int8 / "params.json").read_text())
        (int8 / "params.json").write_text(json.dumps(params | {"quantization": said}))
        with pytest.raises(ValueError, match=r"quantization is .*: this version reads"):
            Llama.build(int8)

    def test_a_file_that_is_not_what_it_says(self, int8: Path) -> None:
        params = json.loads((int8 / "params.json").read_text())
        del params["quantization"]
        (int8 / "params.json").write_text(json.dumps(params))
        with pytest.raises(ValueError, match=r"torch.int8 .*not a plain floating-point tensor"):
            Llama.build(int8)
        params["quantization"] = {"format": "int4", "group_size": 64}
        (int8 / "params.json").write_text(json.dumps(params))
        with pytest.raises(ValueError, match=r"int8.*not a plain torch.uint8 tensor"):
            Llama.build(int8)

    def test_a_missing_scale(self, int8: Path) -> None:
        path = int8 / "consolidated.00.pth"
        tensors = torch.load(path, weights_only=True)
        del tensors["layers.2.feed_forward.w2.scale"]
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=r"lacks layers.2.feed_forward.w2.scale"):
            Llama.build(int8)
