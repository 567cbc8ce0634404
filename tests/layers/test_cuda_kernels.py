"""Kernels for CUDA, whose arithmetic and bytes are tested on any machine."""

import contextlib
import functools
import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.utils._pytree as pytree
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from llama import Transformer
from llama.checkpoint.rounding import round_weight
from llama.layers.capability import Capability
from llama.layers.kernels import cuda, make_kernel, plain, widening
from llama.layers.linear import ParallelLinear, pack
from llama.layers.quantization import Form, Grouped, Rotated, StoredWeight

H100 = Capability("cuda", (9, 0))
COMPILING = Capability("cuda", (9, 0), compiles=True)
T4 = Capability("cuda", (7, 5))
META = torch.device("meta")
BF16 = torch.bfloat16


def random_weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator)


def int8_kernel(dtype: torch.dtype) -> tuple[cuda.Int8, torch.Tensor]:
    """A kernel and the float32 weight that it multiplies by."""
    form, block = Rotated(), Rotated().block_size(128)
    stored = round_weight(form, random_weight(48, 128))
    kernel = make_kernel(stored, form, dtype, block, H100)
    assert type(kernel) is cuda.Int8
    return kernel, form.dequantize(stored, block)


def random_stored(form: Grouped, out_features: int = 48, in_features: int = 256) -> StoredWeight:
    """Codes of all values of a form, with scales and zeros of either sign."""
    generator = torch.Generator().manual_seed(2)
    stored = {}
    for name, shape in form.shapes(out_features, in_features).items():
        codes = torch.randint(-100, 100, shape, generator=generator)
        part = codes if name == "weight" else codes / 1000
        stored[name] = part.to(form.dtypes()[name])
    return stored


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What was compiled, by a compiler that leaves code to PyTorch's operators."""
    compile, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda *args, **how: compile(*args, backend=backend, **how)
    )
    widening._written.cache_clear()
    torch._dynamo.reset()
    yield graphs
    widening._written.cache_clear()


class Bytes(TorchDispatchMode):
    """Counts what operators read and write; views and empty tensors cost nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_weight_int4pack_mm":  # which has no shapes for meta tensors
            out = args[0].new_empty(len(args[0]), 8 * len(args[1]))
        else:
            out = func(*args, **(kwargs or {}))
        if func.is_view or name in ("empty", "empty_like", "new_empty", "_unsafe_view"):
            return out
        reads = pytree.tree_leaves(args[1:] if name == "copy_" else args)  # out= is in kwargs
        for tensor in [*reads, *pytree.tree_leaves(out)]:
            if isinstance(tensor, torch.Tensor):
                self.count += tensor.nbytes
        return out


FLOAT8 = Grouped("float8", 0, has_zeros=False, scale_dtype=torch.float32)
# The products of one of Llama 2 7B's layers: wq, wk and wv; wo; w1 and w3; w2.
SHAPES_7B = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]


def bytes_per_weight(form: Form, n_tokens: int) -> float:
    n_bytes = n_weights = 0
    for out_features, in_features in SHAPES_7B:
        dtypes, shapes = form.dtypes(), form.shapes(out_features, in_features)
        stored = {
            name: torch.empty(shape, dtype=dtypes[name], device=META)
            for name, shape in shapes.items()
        }
        kernel = make_kernel(stored, form, BF16, form.block_size(in_features), H100)
        with Bytes() as counted:
            kernel(torch.empty(n_tokens, in_features, dtype=BF16, device=META))
        n_bytes += counted.count
        n_weights += out_features * in_features
    return n_bytes / n_weights


@pytest.mark.parametrize("n_tokens", [1, 2, 4, 8, 16])
def test_few_tokens_read_little_more_than_the_weights(n_tokens: int) -> None:
    """A failure means that decoding waits for more memory than quantised weights have."""
    assert bytes_per_weight(Rotated(), n_tokens) <= 1.1
    assert bytes_per_weight(Grouped(), n_tokens) <= 0.7
    assert bytes_per_weight(FLOAT8, n_tokens) <= 1.25  # each token is two rows


class TestInt8:
    @pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
    def test_products_are_those_of_the_dequantised_weight(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cuda, "INT8_TOKENS", 48)
        kernel, exact = int8_kernel(dtype)
        for n_tokens in (1, 2, 16, 17, 48, 49, 130):  # 49 and 130 in parts
            x = random_weight(n_tokens, 128, seed=n_tokens).to(dtype)
            out, expected = kernel(x), x.float() @ exact.T
            assert out.dtype == dtype
            assert out.is_contiguous()
            assert (out.float() - expected).norm() / expected.norm() < 0.013

    def test_a_tokens_product_does_not_depend_on_the_others(self) -> None:
        kernel, _ = int8_kernel(BF16)
        x = (random_weight(40, 128) * torch.logspace(-3, 3, 40)[:, None]).to(BF16)
        together = kernel(x)
        for row in (0, 17, 39):
            assert torch.equal(kernel(x[row : row + 1])[0], together[row])

    def test_zeros_give_zeros_and_not_a_number_stays_one(self) -> None:
        kernel, _ = int8_kernel(BF16)
        x = torch.zeros(4, 128, dtype=BF16)
        x[1, 5], x[2, 5] = math.nan, math.inf
        out = kernel(x)
        assert torch.equal(out[[0, 3]], torch.zeros(2, 48, dtype=BF16))
        assert out[1].isnan().all()
        assert not out[2].isfinite().any()

    def test_the_compiler_sees_one_graph(self) -> None:
        """A failure means that compiled steps stop at each product."""
        kernel, _ = int8_kernel(BF16)
        compiled = torch.compile(kernel.product, fullgraph=True, backend="aot_eager")
        for n_tokens in (1, 30):
            x = random_weight(n_tokens, 128).to(BF16)
            assert torch.equal(compiled(x), kernel(x))

    @pytest.mark.parametrize(
        ("shape", "capability"), [((48, 128), T4), ((44, 128), H100), ((48, 100), H100)]
    )
    def test_what_the_operator_does_not_take_is_widened(
        self, shape: tuple[int, int], capability: Capability
    ) -> None:
        form, block = Rotated(), Rotated().block_size(shape[1])
        stored = round_weight(form, random_weight(*shape))
        kernel = make_kernel(stored, form, torch.float32, block, capability)
        assert type(kernel) is plain.Int8
        x = random_weight(1, shape[1], seed=1)
        torch.testing.assert_close(kernel(x), x @ form.dequantize(stored, block).T)


class Tinygemm:
    """The int4 operators of CUDA with an order of their own, on the CPU."""

    def __init__(self, seed: int, spoil: bool = False, alike: bool = False):
        self.seed, self.spoil, self.alike = seed, spoil, alike
        self.rows: list[int] = []

    def permutation(self, inner_tiles: int) -> torch.Tensor:
        """Of all codes of a tile, or alike of each output's, as PyTorch's has it."""
        generator = torch.Generator().manual_seed(self.seed)
        if not self.alike:
            return torch.randperm(128 * inner_tiles, generator=generator)
        inputs = torch.randperm(16 * inner_tiles, generator=generator)
        return (torch.arange(8)[:, None] * len(inputs) + inputs).flatten()

    def pack(self, weight: torch.Tensor, inner_tiles: int) -> torch.Tensor:
        n, k = len(weight), 2 * weight.shape[1]
        assert weight.dtype == torch.uint8
        assert n % 8 == 0 and k % (16 * inner_tiles) == 0
        codes = torch.stack((weight >> 4, weight & 15), dim=2).view(n, k)
        tiles = codes.view(n // 8, 8, -1, 16 * inner_tiles).transpose(1, 2).flatten(2)
        nibbles = tiles[:, :, self.permutation(inner_tiles)]
        if self.spoil:
            nibbles[:, :, 0] = nibbles[:, :, 1]
        packed = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
        return packed.view(torch.int32).unflatten(2, (32, inner_tiles // 2))

    def multiply(
        self, x: torch.Tensor, packed: torch.Tensor, group_size: int, scales: torch.Tensor
    ) -> torch.Tensor:
        assert x.is_contiguous() and x.dtype == scales.dtype == BF16
        self.rows.append(len(x))
        inner_tiles = 2 * packed.shape[3]
        bytes_ = packed.flatten(2).contiguous().view(torch.uint8)
        nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), dim=3).flatten(2)
        tiles = torch.empty_like(nibbles)
        tiles[:, :, self.permutation(inner_tiles)] = nibbles
        codes = tiles.unflatten(2, (8, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        scale, zero = scales.float().transpose(0, 1).repeat_interleave(group_size, 1).unbind(2)
        return (x.float() @ ((codes.float() - 8) * scale + zero).T).to(BF16)


@pytest.fixture(params=[0, 1])
def tinygemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tinygemm]:
    yield from install(Tinygemm(request.param), monkeypatch)


def install(operators: Tinygemm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tinygemm]:
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", operators.pack)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", operators.multiply)
    cuda.nibble_order.cache_clear()
    yield operators
    cuda.nibble_order.cache_clear()


def int4_stored(shape: tuple[int, int], group_size: int = 32) -> StoredWeight:
    return round_weight(Grouped(group_size=group_size), random_weight(*shape))


class TestInt4:
    @pytest.mark.parametrize(
        ("shape", "inner_tiles"), [((44, 256), 8), ((48, 192), 4), ((100, 96), 2)]
    )
    def test_products_are_those_of_the_dequantised_weight(
        self,
        tinygemm: Tinygemm,
        shape: tuple[int, int],
        inner_tiles: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Whatever the operator's order is, for few tokens and many, and back."""
        monkeypatch.setattr(cuda, "INT4_WEIGHTS", 33 * shape[1])  # 32 outputs; the last are fewer
        form, stored = Grouped(group_size=32), int4_stored(shape)
        kernel = make_kernel(stored, form, BF16, 1, H100)
        assert type(kernel) is cuda.Int4
        assert all(torch.equal(kernel.stored()[name], part) for name, part in stored.items())
        exact = form.dequantize(stored, 1)
        for n_tokens in (1, 16, 192, 193):
            x = random_weight(n_tokens, shape[1], seed=n_tokens).to(BF16)
            out, expected = kernel(x), x.float() @ exact.T
            assert out.shape == expected.shape
            assert out.is_contiguous()  # as a collective wants it
            assert (out.float() - expected).norm() / expected.norm() < 5e-3
        assert tinygemm.rows == [1, 16, 192]
        assert kernel._packed.shape[3] == inner_tiles // 2

    @pytest.mark.parametrize(
        "form",
        [
            Grouped("int4", 16),
            Grouped("int4", 0, has_zeros=False),
            Grouped("int8", 32),
            Grouped("int8", 16, has_zeros=False),
        ],
        ids=repr,
    )
    def test_other_forms_are_digits_of_four_bits(self, tinygemm: Tinygemm, form: Grouped) -> None:
        """A failure means that a GPU gives other logits for a quantised file, or other codes."""
        stored = random_stored(form)
        kernel = make_kernel(stored, form, BF16, 1, H100)
        assert type(kernel) is cuda.Int4
        assert all(torch.equal(kernel.stored()[name], part) for name, part in stored.items())
        exact = form.dequantize(stored)
        rows = torch.tensor([47, 0, 8])
        assert torch.equal(kernel.weights(rows), exact[rows])
        for n_tokens in (1, 16, 193):
            x = random_weight(n_tokens, 256, seed=n_tokens).to(BF16)
            out, expected = kernel(x), x.float() @ exact.T
            assert (out.float() - expected).norm() / expected.norm() < 6e-3
        assert set(tinygemm.rows) == {1, 16}

    @pytest.mark.parametrize("alike", [True, False])
    @pytest.mark.parametrize(
        ("form", "in_features"),
        [
            (Grouped("int4", 16), 256),
            (Grouped("int4", 32, has_zeros=False), 192),
            (Grouped("int4", 32), 96),
            (Grouped("int4", 64), 256),
            (Grouped("int4", 256), 256),
            (Grouped("int4", 0, has_zeros=False), 384),
        ],
        ids=repr,
    )
    def test_compiled_code_widens_the_same_weights(
        self,
        form: Grouped,
        in_features: int,
        alike: bool,
        monkeypatch: pytest.MonkeyPatch,
        compilations: list[object],
    ) -> None:
        """A failure means that a prompt's logits are wrong with ``compile=True``."""
        monkeypatch.setattr(widening, "ROOM", 17 * in_features)  # 16 outputs; the last are fewer
        widening._rooms.clear()
        operators = Tinygemm(3, alike=alike)
        for _ in install(operators, monkeypatch):
            stored = random_stored(form, 44, in_features)
            kernel = make_kernel(stored, form, BF16, 1, COMPILING)
            assert type(kernel) is cuda.Int4
            for n_tokens in (1, 12, 25, 193):
                x = random_weight(n_tokens, in_features, seed=n_tokens).to(BF16)
                out, expected = kernel(x), x.float() @ form.dequantize(stored).T
                assert (out.float() - expected).norm() / expected.norm() < 6e-3
            assert set(operators.rows) == {1, 12}
            assert len(compilations) == 2 * alike  # one for each number of outputs

    def test_an_order_that_loses_codes_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for _ in install(Tinygemm(0, spoil=True), monkeypatch):
            kernel = make_kernel(int4_stored((16, 128)), Grouped(group_size=32), BF16, 1, H100)
            assert type(kernel) is plain.Widened

    @pytest.mark.parametrize(
        ("group_size", "dtype", "capability"),
        [
            (128, BF16, H100),
            (0, torch.float16, H100),
            (0, torch.float32, H100),
            (0, BF16, Capability("cuda", (8, 0))),
        ],
    )
    def test_float8_that_has_no_operator_is_widened_to_the_dtype_of_the_inputs(
        self, group_size: int, dtype: torch.dtype, capability: Capability
    ) -> None:
        """A failure means that a GPU gives other logits for a checkpoint in float8."""
        form = Grouped("float8", group_size, False, torch.float32)
        shapes = form.shapes(48, 256)
        weight = random_weight(*shapes["weight"]).mul(50).to(torch.float8_e4m3fn)
        [name] = form.scale_names
        stored = {"weight": weight, name: random_weight(*shapes[name], seed=3).abs() / 100}
        kernel = make_kernel(stored, form, dtype, 1, capability)
        assert type(kernel) is plain.Widened
        x = random_weight(3, 256, seed=4).to(dtype)
        out, expected = kernel(x), x.float() @ form.dequantize(stored).T
        assert out.dtype == dtype
        error = (out.float() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)

    @pytest.mark.parametrize(
        ("dtype", "capability"),
        [(torch.float16, H100), (torch.float32, H100), (BF16, T4), (BF16, Capability())],
    )
    def test_what_the_operator_does_not_take(
        self, dtype: torch.dtype, capability: Capability
    ) -> None:
        assert not cuda.Int4.supports(torch.empty(8, 64, device=META), dtype, capability)

    @pytest.mark.parametrize("ranks", [1, 2, 4, 8])
    @pytest.mark.parametrize(
        ("dim", "hidden"),
        [(576, 1536), (2048, 5632), (4096, 11008), (5120, 13824), (8192, 22016), (8192, 28672)]
        + [(4096, 14336), (3072, 8192), (2048, 8192)],
        ids=["SmolLM2 135M", "TinyLlama", "7B", "13B", "34B", "70B"]
        + ["Llama 3 8B", "Llama 3.2 3B", "Llama 3.2 1B"],
    )
    def test_every_weight_of_published_networks_goes_to_the_operator(
        self, dim: int, hidden: int, ranks: int
    ) -> None:
        """A failure means that some layers of a network are read eight times as slowly."""
        for width in (dim, dim // ranks, hidden // ranks):
            if dim % (64 * ranks) == hidden % (64 * ranks) == 0:  # no group is cut
                weight = torch.empty(8, width // 2, dtype=torch.uint8, device=META)
                assert cuda.Int4.supports(weight, BF16, H100), width


def float8_kernel(capability: Capability = H100) -> tuple[cuda.Float8, torch.Tensor]:
    """A kernel and the float32 weight that it multiplies by."""
    weight = random_weight(48, 256).mul(50).to(torch.float8_e4m3fn)
    stored = {"weight": weight, "scale": random_weight(48, 1, seed=3).abs() / 100}
    kernel = make_kernel(stored, FLOAT8, BF16, 1, capability)
    assert type(kernel) is cuda.Float8
    assert kernel.stored() is stored
    return kernel, FLOAT8.dequantize(stored)


class TestFloat8:
    @pytest.mark.parametrize("capability", [H100, COMPILING], ids=["", "compiled"])
    def test_products_are_those_of_the_widened_weight(
        self, capability: Capability, compilations: list[object]
    ) -> None:
        """As exact as bfloat16's, of inputs of any size and spread."""
        kernel, exact = float8_kernel(capability)
        for n_tokens in (1, 2, 64, 65, 200):  # the last two are widened
            x = random_weight(n_tokens, 256, seed=n_tokens) ** 5  # from 1e-10 to 1e3
            x = (x * torch.logspace(-20, 20, n_tokens)[:, None]).to(BF16)
            out, expected = kernel(x), x.double() @ exact.double().T
            assert out.dtype == BF16
            assert out.is_contiguous()
            errors = (out.double() - expected).norm(dim=1) / expected.norm(dim=1)
            assert errors.max() < (3e-3 if n_tokens <= 64 else 5e-3)
        rows = torch.tensor([47, 0])
        assert torch.equal(kernel.weights(rows), exact[rows])
        assert len(compilations) == capability.compiles

    def test_inputs_are_exact_sums(self) -> None:
        """A failure means that a part of bfloat16's bits is lost."""
        x = (random_weight(9, 256) * torch.logspace(-30, 30, 9)[:, None]).to(BF16)
        both, step = cuda._split(x)
        high, low = (part.float() for part in both.chunk(2))
        sums = (high + low / 16) * step
        near = x.abs() > x.abs().amax(1, keepdim=True) * 2**-12
        assert torch.equal(sums[near], x.float()[near])
        errors = (sums - x.float()).abs() / x.float().abs().amax(1, keepdim=True)
        assert errors.max() < 2**-19

    def test_zeros_give_zeros_and_not_a_number_stays_one(self) -> None:
        kernel, _ = float8_kernel()
        x = torch.zeros(4, 256, dtype=BF16)
        x[1, 5], x[2, 5] = math.nan, math.inf
        out = kernel(x)
        assert torch.equal(out[[0, 3]], torch.zeros(2, 48, dtype=BF16))
        assert not out[[1, 2]].isfinite().any()

    def test_the_compiler_sees_one_graph(self) -> None:
        """A failure means that compiled steps stop at each product."""
        kernel, _ = float8_kernel(COMPILING)
        compiled = torch.compile(kernel.product, fullgraph=True, backend="aot_eager")
        x = random_weight(3, 256).to(BF16)
        assert torch.equal(compiled(x), kernel(x))


class TestFused:
    @pytest.mark.parametrize("dtype", [BF16, torch.float16])
    @pytest.mark.parametrize(
        "form",
        [
            Grouped("int8", 32, has_zeros=False),
            Grouped("int8", 16, has_zeros=False),
            Grouped("int8", 128),
            Grouped("int8", 0),
            Grouped("int8", 128, ordered=True),
            Grouped("float8", 128, has_zeros=False, scale_dtype=torch.float32),
        ],
        ids=repr,
    )
    def test_products_are_those_of_the_dequantised_weight(
        self,
        form: Grouped,
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
        compilations: list[object],
    ) -> None:
        """Of prompts and of compiled steps; the latter see one graph."""
        monkeypatch.setattr(widening, "ROOM", 20 * 256)  # of 48 outputs in three parts
        widening._rooms.clear()
        stored = random_stored(form)
        if form.ordered:
            stored["order"] = torch.randperm(256, generator=torch.Generator().manual_seed(4)).int()
        exact = form.dequantize(stored)
        kernel = make_kernel(dict(stored), form, dtype, 1, COMPILING)
        assert type(kernel.kernel if form.ordered else kernel) is cuda.Fused
        kept = kernel.stored()
        assert all(torch.equal(kept[name].float(), part.float()) for name, part in stored.items())
        for n_tokens in (1, 4, 5, 200):
            x = random_weight(n_tokens, 256, seed=n_tokens).to(dtype)
            out, expected = kernel(x), x.float() @ exact.T
            assert out.dtype == dtype
            assert (out.float() - expected).norm() / expected.norm() < 6e-3
        assert len(compilations) == 1  # 16 outputs each
        step = torch.compile(kernel.product, fullgraph=True, dynamic=False)
        for n_tokens in (1, 4, 5):
            x = random_weight(n_tokens, 256, seed=n_tokens).to(dtype)
            expected = x.float() @ exact.T
            assert (step(x).float() - expected).norm() / expected.norm() < 6e-3
        assert len(compilations) == 4


def test_a_recorded_graph_owns_what_it_reads(
    compilations: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that scales are read from memory that other tensors have by then."""

    class Graph:
        replayed = 0

        def replay(self) -> None:
            Graph.replayed += 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **how: contextlib.nullcontext())
    scales = torch.ones(3)
    alive = weakref.ref(scales)
    replay = widening._recorded(functools.partial(torch.add, scales, 1), torch.device("cuda"))
    del scales
    gc.collect()
    assert alive() is not None
    replay()
    assert Graph.replayed == 1


def plain_model(**params: object) -> Transformer:
    model = make_model(n_kv_heads=2, **params).requires_grad_(False)
    model.allocate_buffers(torch.device("cpu"), torch.float32)
    return model


class TestJoined:
    def test_weights_that_read_the_same_input_are_one_product(self) -> None:
        plain_one, model = plain_model(), plain_model()
        model.capability = H100
        expected = {name: part.clone() for name, part in model.state_dict().items()}
        model.pack()
        for layers in model.linear_groups():
            assert all(type(layer.kernel) is plain.Joined for layer in layers[1:])
            assert len({layer.kernel for layer in layers}) == 1
            assert (layers[0].kernel is None) == (len(layers) == 1)
            assert sum(layer.weight.numel() for layer in layers) == 0 or len(layers) == 1
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        tokens = torch.tensor([[3, 1, 4]])
        torch.testing.assert_close(model.forward(tokens), plain_one.forward(tokens))
        model.load_state_dict(plain_model(seed=1).state_dict())
        assert type(model.layers[0].attention.wk.kernel) is plain.Joined

    def test_nothing_is_joined_elsewhere_or_where_weights_are_trained(self) -> None:
        layers = plain_model().layers[0].attention
        group: list[ParallelLinear] = [layers.wq, layers.wk, layers.wv]
        assert pack(group, Capability("mps")) == []
        assert pack(group, Capability("cpu")) == []  # float32
        layers.wk.requires_grad_(True)
        assert pack(group, H100) == []
        layers.wk.requires_grad_(False)
        group[0].is_shared = True
        assert pack(group, H100) == []
