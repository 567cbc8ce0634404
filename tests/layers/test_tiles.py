"""Weights in tiles, which compiled code reads: with AMX for few tokens in oneDNN's order."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from conftest import make_model

from llama.layers.kernels import Kernel, compiled, cpu, tiles
from llama.layers.kernels.graphs import CpuGraph
from llama.layers.quantization import Form, Grouped, Rotated

BF16 = torch.bfloat16
SHAPES = [(64, 64), (100, 128), (97, 192), (600, 1024)]


@pytest.fixture(autouse=True)
def numba(needs_numba: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILED", 1)


@pytest.fixture(params=[tiles.Bfloat16, cpu.OneDnn])
def plain(request: pytest.FixtureRequest) -> type[tiles.Bfloat16] | type[cpu.OneDnn]:
    """A kernel whose products with few tokens are compiled."""
    if request.param is cpu.OneDnn:
        request.getfixturevalue("amx")
    kind: type[tiles.Bfloat16] | type[cpu.OneDnn] = request.param
    return kind


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def int8_kernel(
    form: Form,
    out_features: int,
    in_features: int,
    kind: type[cpu.Int8] = cpu.OneDnnInt8,
    block_size: int = 64,
) -> cpu.Int8:
    generator = torch.Generator().manual_seed(0)
    shape = (out_features, in_features)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(out_features, 1, generator=generator)
    stored = {"weight": weight, "scale": scale}
    if isinstance(form, Grouped) and form.has_zeros:
        stored["zero"] = torch.rand(out_features, 1, generator=generator)
    return kind(stored, form, block_size)


@pytest.mark.parametrize("shape", [*SHAPES, (70, 96)], ids=str)
def test_a_token_is_multiplied_as_prompts_are(
    shape: tuple[int, int], plain: type[tiles.Bfloat16]
) -> None:
    """A failure means other logits for single tokens, or that they aren't read at full speed."""
    weight, x = random(*shape), random(3, shape[1]) * 3
    kernel = plain({"weight": weight})
    assert kernel._tiles is not None and kernel.min_tokens == 1
    assert torch.equal(kernel.stored()["weight"], weight)
    for row in x:
        out = kernel.product(row[None])
        assert out.dtype == BF16 and out.shape == (1, shape[0]) and out.is_contiguous()
        exact = row.double() @ weight.double().T
        assert ((out[0] - exact).norm() / exact.norm()).item() < 3e-3
    x[0, 5], x[1, 5] = math.nan, math.inf
    assert kernel.product(x[:1]).isnan().all()
    assert not kernel.product(x[1:2]).isfinite().any()


def test_a_token_does_not_depend_on_the_others(plain: type[tiles.Bfloat16]) -> None:
    """A failure means that a batch's logits aren't those of each of its sequences."""
    most = compiled.FEW_TOKENS if plain is cpu.OneDnn else 3 * compiled.TOKENS + 1
    weight, x = random(97, 1216), random(most, 1216)  # more words than are in the cache
    kernel = plain({"weight": weight})
    alone = torch.cat([kernel.product(row[None]) for row in x])
    for n_tokens in range(2, most + 1):
        assert torch.equal(kernel.product(x[:n_tokens]), alone[:n_tokens])


@pytest.mark.parametrize("form", [None, Rotated(), Grouped("int8", 0, has_zeros=False)], ids=repr)
def test_no_tokens_have_no_products(form: Form | None) -> None:
    """A failure means that a prompt that is read in pieces crashes where a piece has no logits."""
    kernels: list[Kernel] = []
    if form is None:
        kinds = [tiles.Bfloat16, *([cpu.OneDnn] if compiled.HAS_AMX else [])]
        kernels += [kind({"weight": random(97, 192)}) for kind in kinds]
    else:
        int8_kinds = [cpu.TiledInt8, *([cpu.OneDnnInt8] if compiled.HAS_AMX else [])]
        kernels += [int8_kernel(form, 97, 192, kind) for kind in int8_kinds]
    for kernel in kernels:
        out = kernel.product(random(0, 192))
        assert out.shape == (0, 97) and out.dtype == BF16


def test_onednn_goes_on_where_it_was(amx: None) -> None:
    """A failure means that compiled code leaves AMX to PyTorch's products in another state."""
    few, many = cpu.OneDnn({"weight": random(128, 64)}), cpu.OneDnn({"weight": random(96, 256)})
    x, y = random(5, 64), random(300, 256)
    expected, products = few.product(x), many.product(y)
    for n_tokens in (1, 5, 2, 17):
        few.product(random(n_tokens, 64))
        assert torch.equal(many.product(y), products)
        assert torch.equal(few.product(x), expected)


def test_a_tied_embedding_is_read_from_the_outputs_tiles() -> None:
    """A failure means that it lies in memory twice, or gives other vectors than the weight's."""
    model = make_model(tie_word_embeddings=True, dim=64).to(BF16).requires_grad_(False)
    model.output.weight = model.tok_embeddings.weight
    model.allocate_buffers(torch.device("cpu"), BF16)
    tokens = torch.tensor([[3, 1, 2]])
    expected, vectors = model.forward(tokens), model.tok_embeddings(tokens)
    state = {name: part.clone() for name, part in model.state_dict().items()}
    model.pack()
    kernel = model.output.kernel
    kind = cpu.OneDnn if compiled.HAS_AMX else tiles.Bfloat16
    assert type(kernel) is kind and model.tok_embeddings.kernel is kernel
    other = copy.deepcopy(model)
    assert other.tok_embeddings.kernel is other.output.kernel is not kernel
    assert torch.equal(other.forward(tokens), model.forward(tokens))
    assert not model.output.weight.numel() and not model.tok_embeddings.weight.numel()
    assert torch.equal(model.tok_embeddings(tokens), vectors)
    torch.testing.assert_close(model.forward(tokens), expected, atol=0.05, rtol=0.05)
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())
    changed = {"tok_embeddings.weight": state["tok_embeddings.weight"].flip(1)}
    model.load_state_dict(changed, strict=False)
    assert torch.equal(model.tok_embeddings(tokens), vectors.flip(2))
    assert torch.equal(model.output.stored()["weight"], changed["tok_embeddings.weight"])
    # A graph looks vectors up in compiled code.
    graph = CpuGraph(model.tok_embeddings, tokens[0], CpuGraph.pool(model))
    with torch.inference_mode():
        for ids in ([3, 1, 2], [1, 1, 0], [0, 9, 9]):
            expected = model.tok_embeddings(torch.tensor(ids))
            for _ in range(5):
                assert torch.equal(graph(torch.tensor(ids)), expected)


def test_a_tied_weight_stays_where_its_order_is_unknown(
    amx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that it lies in memory twice with another release of oneDNN."""
    monkeypatch.setattr(tiles.Tiles, "find", lambda packed, weight: None)
    model = make_model(tie_word_embeddings=True, dim=64).to(BF16).requires_grad_(False)
    model.output.weight = model.tok_embeddings.weight
    model.pack()
    assert model.layers[0].attention.wq.kernel is not None
    assert model.output.kernel is None and model.tok_embeddings.kernel is None
    assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()


@pytest.mark.parametrize("form", [Rotated(), Grouped("int8", 0, has_zeros=False)], ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits_give_onednns_products(
    form: Form, shape: tuple[int, int], amx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that a token's logits depend on how many others are computed with it."""
    kernel, x = int8_kernel(form, *shape), random(compiled.FEW_TOKENS + 1, shape[1])
    calls = []
    product = tiles.Tiles.int8_product
    monkeypatch.setattr(
        tiles.Tiles, "int8_product", lambda *args: calls.append(1) or product(*args)
    )
    whole = kernel.product(x)
    assert not calls
    near = whole.abs().max().item() * 1e-5  # of numbers that nearly cancel out
    most = compiled.FEW_TOKENS if isinstance(form, Rotated) else compiled.FEW_TOKENS // 2
    for n_tokens in range(1, most + 1):
        torch.testing.assert_close(
            kernel.product(x[:n_tokens]), whole[:n_tokens], rtol=1e-2, atol=near
        )
        same = (kernel.product(x[:n_tokens]) == whole[:n_tokens]).float().mean()
        assert same > 0.98  # the others are rounded between two numbers
    assert len(calls) == 2 * most
    x[0, 5], x[1] = math.nan, 0
    assert kernel.product(x[:1]).isnan().all()
    assert not kernel.product(x[1:2]).any()


FORMS = [Rotated(), Grouped("int8", 0, has_zeros=False), Grouped("int8", 0)]


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("shape", [(64, 64), (97, 192), (600, 2112)], ids=str)
def test_eight_bits_in_tiles_give_fbgemms_products(form: Form, shape: tuple[int, int]) -> None:
    """A failure means that int8 gives other logits, or some that depend on neighbours."""
    if not cpu.HAS_FBGEMM:
        pytest.skip("this build has no FBGEMM")
    size = 32 if shape[1] == 192 else 64
    kernel, theirs = (int8_kernel(form, *shape, kind, size) for kind in (cpu.TiledInt8, cpu.Int8))
    x = random(2 * compiled.TOKENS + 3, shape[1])
    alone = torch.cat([kernel.product(row[None]) for row in x])
    exact = x.float() @ kernel.weights(torch.arange(shape[0])).T
    off, others = ((out - exact).norm() / exact.norm() for out in (alone, theirs.product(x)))
    assert off < min(0.01, 1.02 * others)
    for n_tokens in (*range(1, 2 * tiles.ROWS), compiled.TOKENS, compiled.TOKENS + 1, len(x)):
        assert torch.equal(kernel.product(x[:n_tokens]), alone[:n_tokens])
    assert all(torch.equal(part, theirs.stored()[name]) for name, part in kernel.stored().items())
    rows = torch.tensor([3, 0, shape[0] - 1])
    assert torch.equal(kernel.weights(rows), theirs.weights(rows))
    x[0, 5], x[1] = math.nan, 0
    assert kernel.product(x[:1]).isnan().all()
    assert not kernel.product(x[1:2]).any()


def test_an_owned_weight_is_changed_where_it_is() -> None:
    """A failure means that loading int8 takes another copy of each weight, or changes a file's."""
    weight = torch.randint(-127, 128, (64, 128), dtype=torch.int8)
    stored, before = {"weight": weight, "scale": torch.ones(64, 1)}, weight.clone()
    kernel = cpu.TiledInt8(stored, Rotated(), 64)
    assert torch.equal(weight, before) and torch.equal(kernel.stored()["weight"], before)
    kernel = cpu.TiledInt8(stored, Rotated(), 64, owned=True)
    assert kernel._tiles._words.data_ptr() == weight.data_ptr()
    assert torch.equal(kernel.stored()["weight"], before)


def test_an_outlier_drowns_its_own_span_alone() -> None:
    """A failure means that int8 rounds a token's inputs by the largest of all: worse answers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 1024), dtype=torch.int8, generator=generator)
    weight[:, : compiled.SPAN] = 0
    form, stored = Rotated(), {"weight": weight, "scale": torch.ones(64, 1)}
    x = torch.randn(4, 1024, generator=generator)
    x[:, 7] = 4000
    exact = x @ form.dequantize(stored, 64).T
    assert (cpu.TiledInt8(stored, form, 64).product(x) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_scale_that_is_no_number_stays_so(dtype: torch.dtype) -> None:
    """A failure means that a damaged file gives zeros, and isn't found out."""
    stored = {"weight": torch.ones(32, 64, dtype=torch.int8), "scale": torch.ones(32, 1)}
    stored["scale"].view(torch.int32)[3] = 0x7FFFE000
    out = cpu.TiledInt8(stored, Rotated(), 64).product(torch.ones(2, 64, dtype=dtype))
    assert out[:, 3].isnan().all() and not out[:, :3].isnan().any()


def test_the_largest_bytes_do_not_overflow() -> None:
    """A failure means that without VNNI sums of two products saturate: other logits, silently."""
    stored = {"weight": torch.full((16, 64), -128, dtype=torch.int8), "scale": torch.ones(16, 1)}
    kernel = cpu.TiledInt8(stored, Grouped("int8", 0, has_zeros=False), 1)
    for x in (torch.ones(1, 64), torch.ones(1, 64).neg()):
        assert torch.equal(kernel.product(x), (x.sum() * -128).expand(1, 16))


def test_zeros_are_left_to_onednn(amx: None) -> None:
    """A failure means that a file's zero points are lost for single tokens."""
    kernel, x = int8_kernel(Grouped("int8", 0), 100, 128), random(9, 128)
    assert torch.equal(kernel.product(x[:1]), kernel.product(x)[:1])


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_any_number_of_threads_computes_every_output(
    n_tokens: int, plain: type[tiles.Bfloat16]
) -> None:
    """A failure means that outputs are left as memory was, or written twice."""
    kernel, x = plain({"weight": random(160, 64)}), random(n_tokens, 64)
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 3, 8):
        torch.set_num_threads(n_threads)
        found.append(kernel.product(x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_another_order_is_left_to_onednn(amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that a release of oneDNN with another order makes every logit nonsense."""
    weight = random(128, 128)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    assert tiles.Tiles.find(packed, weight) is not None
    assert tiles.Tiles.find(packed, weight.flip(0)) is None
    assert tiles.Tiles.find(packed, weight.flip(1)) is None
    alike = torch.ones(128, 128, dtype=BF16)
    packed = torch.ops.mkldnn._reorder_linear_weight(alike, None)
    assert tiles.Tiles.find(packed, alike) is None  # any order would do
    narrow = random(128, 80)
    packed = torch.ops.mkldnn._reorder_linear_weight(narrow, None)
    assert tiles.Tiles.find(packed, narrow) is None
    kernel = cpu.OneDnn({"weight": narrow})
    assert kernel.product(random(1, 80)).shape == (1, 128)
    monkeypatch.setattr(tiles, "TILED", 128 * 128 + 1)
    assert cpu.OneDnn({"weight": weight})._tiles is None  # too small to compile code for


def test_a_forked_process_goes_on() -> None:
    """A failure means that a call in a forked worker waits for ever for its parent's threads."""
    code = (
        "import os, torch; from llama.layers.kernels.openmp import release_team\n"
        "torch.set_num_threads(3); torch.ones(1 << 20).add_(1)\n"
        "pid = os.fork()\n"
        "if pid == 0: torch.set_num_threads(1); release_team(); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "7\n", done.stderr
