"""Kernels of weights in groups: each gives the product of the dequantised weight, and it back."""

import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from processes import wait_until

from llama import Llama
from llama.checkpoint import load
from llama.convert import convert
from llama.generation import TINY
from llama.layers.capability import Capability, cpu_has_amx, fast_dtype
from llama.layers.kernels import (
    compiled,
    cpu,
    digits,
    form_in,
    groups,
    make_kernel,
    openmp,
    plain,
    plain_kernel,
    tiles,
)
from llama.layers.kernels.base import Kernel
from llama.layers.quantization import Form, Grouped, Rotated, StoredWeight

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMS = [
    *(Grouped("int4", size, zeros) for size in (0, 16, 32, 256, 512) for zeros in (True, False)),
    *(Grouped("int8", size, zeros) for size in (0, 16, 32, 128) for zeros in (True, False)),
    Grouped("int4", 32, ordered=True),
    Grouped("int8", 16, has_zeros=False, ordered=True),
    *(Grouped("float8", size, False, F32) for size in (0, 128)),
]
FINE = [  # as compiled code keeps files' scales
    *(Grouped(codes, 32, scale_dtype=F16) for codes in ("int4", "int8")),
    Grouped("int8", 16, has_zeros=False, scale_dtype=F16),
]
IN_FEATURES = 1024
N_TOKENS = (1, 4, 5, 130)


def random_weight(
    form: Form, out_features: int = 100, largest: int = 128, in_features: int = IN_FEATURES
) -> StoredWeight:
    """A weight's stored tensors; codes of eight bits are below ``largest``."""
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for name, shape in form.shapes(out_features, in_features).items():
        dtype = form.dtypes()[name]
        if name == "order":
            part = torch.randperm(in_features, generator=generator)
        elif dtype == torch.uint8:
            part = torch.randint(256, shape, generator=generator)
        elif dtype == torch.int8:
            part = torch.randint(-largest, largest, shape, generator=generator)
        else:
            part = torch.rand(shape, generator=generator) - 0.2
        stored[name] = part.to(dtype)
    return stored


def kernel_of(form: Grouped, dtype: torch.dtype, stored: StoredWeight) -> Kernel:
    own = {name: part.clone() for name, part in stored.items()}
    return make_kernel(own, form, dtype, 1, Capability())


def inner(kernel: Kernel) -> Kernel:
    return kernel.kernel if isinstance(kernel, digits.Ordered) else kernel


def errors(
    kernel: Kernel, exact: torch.Tensor, dtype: torch.dtype, numbers: Sequence[int] = N_TOKENS
) -> list[float]:
    """The relative errors of products of some numbers of tokens."""
    found = []
    for n_tokens in numbers:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(n_tokens, exact.shape[1], generator=generator).to(dtype)
        out, expected = kernel(x), x.float() @ exact.T
        assert out.dtype == dtype
        assert out.shape == expected.shape
        assert out.is_contiguous()  # as a collective wants it
        found.append(((out.float() - expected).norm() / expected.norm()).item())
    return found


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compiled, cpu, groups):
        monkeypatch.setattr(module, "has_numba", lambda: False)


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_products_are_those_of_the_dequantised_weight(
    form: Grouped, dtype: torch.dtype, without_numba: None
) -> None:
    """A failure means that a quantised file gives other logits than its formula."""
    stored = random_weight(form, largest=120)
    kernel = kernel_of(form, dtype, stored)
    bound = {F32: 1e-6, F16: 4e-3, BF16: 4e-3}[dtype]
    assert max(errors(kernel, form.dequantize(stored), dtype)) < bound


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_weights_come_back_exactly_whole_and_by_rows(form: Grouped, without_numba: None) -> None:
    """A failure means that saving changes a weight, or that a tied embedding isn't the output's."""
    stored = random_weight(form, largest=120)
    kernel = kernel_of(form, BF16, stored)
    back = kernel.stored()
    assert back.keys() == stored.keys()
    for name, part in stored.items():
        assert back[name].dtype == part.dtype
        assert torch.equal(back[name].float(), part.float()), name
    rows = torch.tensor([99, 0, 63, 64])
    assert torch.equal(kernel.weights(rows), form.dequantize(stored)[rows])


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (Grouped("int4", 16), cpu.Int4),
        (Grouped("int4", 0), cpu.Int4),
        (Grouped("int8", 16, has_zeros=False), cpu.Int4),
        (Grouped("int8", 32), cpu.Int4),
        (Grouped("int8", 0), cpu.OneDnnInt8 if cpu.OneDnnInt8.is_fastest() else cpu.Int8),
        (Grouped("int8", 16), plain.Widened),  # zeros, which its digits leave no place for
        (Grouped("float8", 128, False, F32), plain.Widened),
    ],
    ids=repr,
)
def test_half_precision_gets_the_fast_operators(
    form: Grouped, kind: type, without_numba: None
) -> None:
    """A failure means that a common file is multiplied ten times as slowly as it could be."""
    if kind is cpu.Int4 and not cpu.int4_tile():
        pytest.skip("this processor has no fast int4 operator")
    if kind is not plain.Widened and "int8" in form.codes and not cpu.HAS_FBGEMM:
        pytest.skip("this build has no FBGEMM")
    assert type(kernel_of(form, BF16, random_weight(form, largest=32))) is kind
    assert type(kernel_of(form, F32, random_weight(form, largest=32))) is plain.Widened


def test_codes_that_two_digits_cannot_hold_are_widened(without_numba: None) -> None:
    """A failure means that the largest codes of a group of 16 turn into others."""
    form = Grouped("int8", 16, has_zeros=False)
    stored = random_weight(form)
    stored["weight"][0, 0] = 127
    kernel = kernel_of(form, BF16, stored)
    assert type(kernel) is plain.Widened
    assert max(errors(kernel, form.dequantize(stored), BF16)) < 4e-3


def test_the_compiler_sees_through_products_in_a_fast_dtype() -> None:
    """A failure means that ``compile=True`` divides a layer at each bfloat16 product."""
    form = Grouped("float8", 128, False, F32)
    kernel = kernel_of(form, BF16, random_weight(form))
    weight = torch.randn(8, IN_FEATURES).bfloat16()

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel(x), plain.linear(x, weight)

    x = torch.randn(3, IN_FEATURES).bfloat16()
    found = torch.compile(both, backend="eager", fullgraph=True)(x)
    assert all(torch.equal(*pair) for pair in zip(found, both(x), strict=True))


def test_large_float16_inputs_stay_finite(without_numba: None) -> None:
    """A failure means that 16 times an outlier, by high digits, exceeds the range of float16."""
    form = Grouped("int8", 16, has_zeros=False)
    stored = random_weight(form, largest=120)
    stored["scales"] /= 1000
    kernel = kernel_of(form, F16, stored)
    x = torch.randn(2, IN_FEATURES).half()
    x[:, 3] = 6000
    expected = x.float() @ form.dequantize(stored).T
    assert (kernel(x).float() - expected).norm() / expected.norm() < 0.01


def test_float32_rows_do_not_depend_on_their_number() -> None:
    """A failure means that a float32 build rounds inputs, or differs by batch."""
    form = Grouped("int4", 32, scale_dtype=F32)
    stored = random_weight(form)
    kernel = kernel_of(form, F32, stored)
    x = torch.randn(80, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    together = kernel(x)
    alone = torch.cat([kernel(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)


def test_outliers_do_not_drown_other_inputs_of_whole_rows() -> None:
    """A failure means that unrotated weights of eight bits lose a token's small inputs."""
    form = Grouped("int8", 0, has_zeros=False)
    if not cpu.HAS_FBGEMM:
        pytest.skip("this build has no FBGEMM")
    stored = random_weight(form)
    stored["weight"][:, 7] = 0
    kernel = kernel_of(form, BF16, stored)
    x = torch.randn(3, IN_FEATURES, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[:, 7] = 400
    expected = x.float() @ form.dequantize(stored).T
    assert (kernel(x).float() - expected).norm() / expected.norm() < 0.02  # one digit: 0.9


@pytest.mark.parametrize("form", [Rotated(), Grouped("int8", 0)], ids=repr)
def test_onednn_multiplies_as_fbgemm_does(form: Form) -> None:
    """A failure means that with AMX, where it is chosen, int8 gives other products."""
    if not (cpu.HAS_FBGEMM and torch.backends.mkldnn.is_available()):
        pytest.skip("this build lacks one of them")
    stored = random_weight(form)
    ours, theirs = (kind(stored, form, 64) for kind in (cpu.OneDnnInt8, cpu.Int8))
    generator = torch.Generator().manual_seed(0)
    for n_tokens in N_TOKENS:
        shape, most = (n_tokens, IN_FEATURES), cpu.LEVELS
        levels = torch.randint(-most, most + 1, shape, generator=generator)
        # Far from the middle of two levels, which they round to different ones.
        inputs = (levels + 0.8 * torch.rand(shape, generator=generator) - 0.4).clamp_(-most, most)
        products = [kernel._multiply(inputs.clone()) / most for kernel in (ours, theirs)]
        torch.testing.assert_close(*products, atol=2e-4, rtol=1e-4)
    assert all(torch.equal(ours.stored()[name], part) for name, part in theirs.stored().items())


class TestCompiled:
    """Weights that numba's code multiplies, whose inputs have eight bits for few tokens."""

    @pytest.fixture(autouse=True)
    def numba(self) -> None:
        pytest.importorskip("numba")
        if not compiled.has_numba():
            pytest.skip("numba's code is for x86 and Linux")

    @pytest.mark.parametrize(
        "form",
        [
            form
            for form in FORMS + FINE
            if form.codes != "float8" and (form.group_size or form.codes == "int4")
        ],
        ids=repr,
    )
    def test_products_are_those_of_the_dequantised_weight(self, form: Grouped) -> None:
        """A failure means that single tokens get other logits than prompts."""
        stored = random_weight(form)
        kernel = kernel_of(form, BF16, stored)
        assert type(inner(kernel)) is groups.Groups
        assert max(errors(kernel, form.dequantize(stored), BF16)) < 0.012
        assert all(torch.equal(kernel.stored()[name], part) for name, part in stored.items())

    @pytest.mark.parametrize(
        ("form", "in_features"),
        [
            (form, in_features)
            for form in FORMS + FINE
            for in_features in (32, 192, 256, 576)
            if not (form.ordered or form.codes == "float8" or in_features % (form.group_size or 1))
        ],
        ids=repr,
    )
    def test_any_width(self, form: Grouped, in_features: int) -> None:
        """A failure means that a network of an unusual width gets other logits."""
        stored = random_weight(form, in_features=in_features)
        exact = form.dequantize(stored)
        kernel = groups.Groups(stored, form)
        assert max(errors(kernel, exact, BF16)) < 0.015
        one = torch.eye(in_features, dtype=BF16)  # whose product is the weight
        assert torch.equal(kernel._widened_product(one), exact.bfloat16().T)

    @pytest.mark.parametrize("form", [FINE[0], Grouped("int8", 16), Rotated()], ids=repr)
    def test_inputs_of_all_dtypes_are_rounded_alike(self, form: Form) -> None:
        """A failure means that a float16 network computes something else, or some inputs do."""
        stored = random_weight(form)
        if isinstance(form, Grouped):
            kernel: Kernel = groups.Groups(stored, form)
        else:
            kernel = cpu.TiledInt8(stored, form, 32)
        x = torch.randn(7, IN_FEATURES, generator=torch.Generator().manual_seed(0)).bfloat16()
        wide, half = kernel.product(x.float()), kernel.product(x)
        assert (wide.dtype, half.dtype) == (F32, BF16)
        torch.testing.assert_close(half.float(), wide, rtol=2**-8, atol=1e-6)
        assert torch.equal(kernel.product(x.to(F16)), wide.to(F16))
        apart = torch.stack((x, x), dim=1).flatten(0, 1)[::2]
        assert not apart.is_contiguous() and torch.equal(kernel.product(apart), half)

    def test_files_scales_are_kept_as_exactly_as_bytes_allow(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure means that a file's perplexity rises by a thousandth or two on a CPU, or that
        scales are in a form that the machine's fastest operators don't take."""
        cpu_, cuda_ = torch.device("cpu"), torch.device("cuda")
        own = Grouped("int4", 32, scale_dtype=F32)
        assert form_in(own, BF16, cpu_) == form_in(own, F16, cpu_) == FINE[0]
        assert form_in(own, BF16, cuda_) == replace(own, scale_dtype=BF16)
        assert form_in(own, F32, cpu_) == own
        rows = Grouped("int8", 0, False, F32)  # whose scales may be small: FBGEMM has float32
        assert form_in(rows, BF16, cpu_) == replace(rows, scale_dtype=BF16)
        for form in (Grouped("int4", 64), Grouped("float8", 0, False, F32), Rotated()):
            assert form_in(form, BF16, cpu_) == form
        monkeypatch.setattr(groups, "has_numba", lambda: False)
        assert form_in(own, BF16, cpu_) == replace(own, scale_dtype=BF16)

    @pytest.mark.parametrize("rows", [32, 64])
    def test_weights_are_widened_in_parts(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A failure means that prompts of a large network get other weights than single tokens."""
        monkeypatch.setattr(groups, "WIDENED", 1)
        monkeypatch.setattr(groups, "WIDENED_ROWS", rows)
        form = Grouped("int4", 32)
        stored = random_weight(form)
        exact = form.dequantize(stored)
        found = groups.Groups(stored, form)._widened_product(torch.eye(IN_FEATURES, dtype=BF16))
        assert torch.equal(found, exact.bfloat16().T)

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_rotated_weights_without_amx(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure means that ``quantize="int8"`` gives other logits, or changes its inputs."""
        monkeypatch.setattr(cpu.OneDnnInt8, "is_fastest", lambda: False)
        form, generator = Rotated(), torch.Generator().manual_seed(0)
        stored = {
            "weight": torch.randint(-127, 128, (100, IN_FEATURES), generator=generator),
            "scale": torch.rand(100, 1, generator=generator),
        }
        stored["weight"] = stored["weight"].to(torch.int8)
        exact = form.dequantize(stored, 64)
        own = {name: part.clone() for name, part in stored.items()}
        kernel = make_kernel(own, form, dtype, 64, Capability())
        assert type(kernel) is cpu.TiledInt8
        assert max(errors(kernel, exact, dtype)) < 0.01
        assert all(torch.equal(kernel.stored()[name], part) for name, part in stored.items())
        assert torch.equal(kernel.weights(torch.tensor([99, 3])), exact[[99, 3]])
        x = torch.randn(3, IN_FEATURES, generator=generator).to(dtype)
        before = x.clone()
        together = kernel(x)
        assert torch.equal(x, before)
        assert torch.equal(together, torch.cat([kernel(row[None]) for row in x]))

    @pytest.mark.parametrize("out_features", [100, 128])
    @pytest.mark.parametrize("owned", [False, True])
    def test_only_owned_weights_are_changed(self, out_features: int, owned: bool) -> None:
        """A failure means that a checkpoint that was read isn't the same any more."""
        form = Grouped("int4", 32)
        stored = random_weight(form, out_features=out_features)
        own = {name: part.clone() for name, part in stored.items()}
        exact = form.dequantize(stored)
        kernel = groups.Groups(own, form, owned=owned)
        assert max(errors(kernel, exact, BF16)) < 0.012
        back = kernel.stored()
        assert all(torch.equal(back[name], part) for name, part in stored.items())
        is_same = all(torch.equal(own[name], part) for name, part in stored.items())
        is_changed = owned and not out_features % groups.TILE  # else it is padded, in a copy
        assert is_same == (not is_changed)

    def test_vectors_of_256_bits_compute_the_same(self) -> None:
        """A failure means that a processor without AVX-512 gets other logits."""
        script = """
            from test_kernels import *
            assert compiled.LANES == 8
            TestCompiled().test_a_tokens_product_does_not_depend_on_the_others()
            for form in FORMS:
                if form.codes != "float8" and (form.group_size or form.codes == "int4"):
                    TestCompiled().test_products_are_those_of_the_dequantised_weight(form)
            for shape in PLAIN_SHAPES:
                test_plain_weights_are_read_in_bfloat16(shape, None)
            import test_tiles
            for form in test_tiles.FORMS:
                test_tiles.test_eight_bits_in_tiles_give_fbgemms_products(form, (97, 192))
                test_tiles.test_eight_bits_in_tiles_give_fbgemms_products(form, (64, 576))
            test_tiles.test_the_largest_bytes_do_not_overflow()
        """
        paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": paths, "ONEDNN_MAX_CPU_ISA": "AVX2"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def test_any_number_of_threads_computes_every_output(self) -> None:
        """A failure means that outputs are left as they were, or written twice."""
        form = Grouped("int4", 32)
        stored = random_weight(form, out_features=7)
        kernel = kernel_of(form, BF16, stored)
        x = torch.randn(1, IN_FEATURES).bfloat16()
        found = []
        before = torch.get_num_threads()
        for n_threads in (1, 3, 8):
            torch.set_num_threads(n_threads)
            found.append(kernel(x))
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    def test_fewer_threads_than_were_asked_for_compute_every_output(self) -> None:
        """A failure means that under ``OMP_THREAD_LIMIT`` outputs are what memory held before."""
        form = Grouped("int4", 32)
        stored = random_weight(form)
        kernel = kernel_of(form, BF16, stored)
        library, before = openmp.openmp(), torch.get_num_threads()
        assert library is not None
        levels = library.omp_get_max_active_levels()
        torch.set_num_threads(4)
        library.omp_set_max_active_levels(0)  # one thread
        try:
            # Of more tokens PyTorch's own product is wrong then, with AMX.
            few = [n for n in N_TOKENS if n <= groups.FEW_IN_GROUPS]
            assert max(errors(kernel, form.dequantize(stored), BF16, few)) < 0.012
        finally:
            library.omp_set_max_active_levels(levels)
            torch.set_num_threads(before)

    def test_zeros_give_zeros_and_not_a_number_stays_one(self) -> None:
        form = Grouped("int4", 32, has_zeros=False)
        kernel = kernel_of(form, BF16, random_weight(form))
        x = torch.zeros(3, IN_FEATURES, dtype=BF16)
        x[1, 5], x[2, 5] = math.nan, math.inf
        out = kernel(x)
        assert torch.equal(out[0], torch.zeros(100, dtype=BF16))
        assert out[1].isnan().all()
        assert not out[2].isfinite().any()

    def test_a_tokens_product_does_not_depend_on_the_others(self) -> None:
        form = Grouped("int8", 16, has_zeros=False)
        kernel = kernel_of(form, BF16, random_weight(form))
        x = torch.randn(7, IN_FEATURES).bfloat16()
        assert torch.equal(kernel(x), torch.cat([kernel(row[None]) for row in x]))


def test_no_more_threads_than_openmp_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means wrong logits under ``OMP_THREAD_LIMIT`` on a processor with AMX."""
    before, library = torch.get_num_threads(), SimpleNamespace(omp_get_thread_limit=lambda: 2)
    monkeypatch.setattr(openmp, "openmp", lambda: library)
    try:
        for wanted, found in ((3, 2), (1, 1)):
            torch.set_num_threads(wanted)
            Llama.build(device="cpu", max_seq_len=8, max_batch_size=1)
            assert torch.get_num_threads() == found
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(openmp.openmp() is None, reason="PyTorch has another OpenMP")
def test_a_loaded_model_leaves_no_team_behind(tiny: Llama) -> None:
    """A failure means that a server's tokens take a fifth longer: its engine's thread would compute
    beside the team of the thread that loaded the model.

    ``tiny`` has started the threads of collectives.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.ones(1 << 20).add_(1)
        with_team = len(os.listdir("/proc/self/task"))
        Llama.build(device="cpu", max_seq_len=8, max_batch_size=1)
        wait_until(lambda: len(os.listdir("/proc/self/task")) <= with_team - 3)
        assert torch.ones(1 << 20).add_(1).sum() == 2 << 20
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(openmp.openmp() is None, reason="PyTorch has another OpenMP")
def test_calls_from_threads_leave_no_teams_behind(tiny: Llama) -> None:
    """A failure means that the calls of a web framework's threads slow each other down."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    n_before = len(os.listdir("/proc/self/task"))
    both, counts = threading.Barrier(2, timeout=60), []

    def call() -> None:
        tiny.generate([list(range(1, 200))], 1)
        both.wait()  # as threads of a pool, which go on
        counts.append(len(os.listdir("/proc/self/task")) - n_before)
        both.wait()

    try:
        with ThreadPoolExecutor(2) as pool:
            for each in [pool.submit(call) for _ in range(2)]:
                each.result()
    finally:
        torch.set_num_threads(before)
    assert min(counts) <= 2 + 1  # where one has just ended


def test_float8_is_widened_to_every_value() -> None:
    """A failure means that some float8 numbers turn into others."""
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 127) != 127]  # not a number
    values = codes.view(torch.float8_e4m3fn)
    found = Grouped("float8", 0, False, F32).values(values)
    assert torch.equal(found, values.float())


def test_a_slow_dtype_is_multiplied_and_attended_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failure means that bfloat16 takes eight times as long on processors without it."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (9, 33))
    monkeypatch.setattr(plain, "fast_dtype", lambda dtype: F32)
    monkeypatch.setattr(plain, "_WIDENED", 640)  # ten rows at a time
    seen = []
    linear = torch.nn.functional.linear

    def recorded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, len(weight)))
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    out = plain.linear(x, weight)
    assert seen == [(F32, 10)] * 3 + [(F32, 3)]
    assert out.dtype == BF16
    torch.testing.assert_close(out.float(), x.float() @ weight.float().T, atol=0.1, rtol=0.01)
    assert fast_dtype(F16) == F32  # which no processor here multiplies


@pytest.fixture
def plain_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for bfloat16, with numba."""
    if not compiled.has_numba():
        pytest.skip("numba or AVX2 is missing")
    monkeypatch.setattr(tiles, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(tiles, "HAS_AMX", False)
    monkeypatch.setattr(cpu.OneDnn, "is_fastest_for", lambda weight: False)


PLAIN_SHAPES = [(100, 1024), (3, 44), (1, 4)]


@pytest.mark.parametrize("shape", PLAIN_SHAPES, ids=str)
def test_plain_weights_are_read_in_bfloat16(shape: tuple[int, int], plain_bf16: None) -> None:
    """A failure means that a plain checkpoint gives other logits with AVX2 alone, or twice the
    bytes."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    kind = plain_kernel(weight, 1, True, Capability())
    assert kind is tiles.Bfloat16
    kernel = kind({"weight": weight})
    assert torch.equal(kernel.stored()["weight"], weight)
    assert torch.equal(kernel.weights(torch.tensor([0, len(weight) - 1])), weight[[0, -1]].float())
    for n_tokens in (1, 3, 4, 7, 16, 133):
        x = torch.randn(n_tokens, shape[1]).bfloat16()
        torch.testing.assert_close(
            kernel(x), (x.float() @ weight.float().T).bfloat16(), atol=1e-2, rtol=1e-2
        )
        assert torch.equal(kernel(x)[-1:], kernel(x[-1:]))
    x[0, 0] = torch.nan
    assert kernel(x[:1]).isnan().all() and not kernel(x[1:3]).isnan().any()


def test_a_shared_weight_lies_in_memory_once(plain_bf16: None) -> None:
    """A failure means that a tied embedding is copied, or gives other vectors than the weight's."""
    model = make_model(tie_word_embeddings=True).to(BF16).requires_grad_(False)
    model.output.weight = model.tok_embeddings.weight
    model.allocate_buffers(torch.device("cpu"), BF16)
    tokens = torch.tensor([[3, 1, 2]])
    expected, vectors = model.forward(tokens), model.tok_embeddings(tokens)
    model.pack()
    kernel = model.output.kernel
    assert type(kernel) is tiles.Bfloat16 and model.tok_embeddings.kernel is kernel
    assert not model.output.weight.numel() and not model.tok_embeddings.weight.numel()
    assert torch.equal(model.tok_embeddings(tokens), vectors)
    torch.testing.assert_close(model.forward(tokens), expected, atol=0.05, rtol=0.05)


def test_large_plain_checkpoints_are_computed_in_bfloat16(
    plain_bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that with AVX2 alone a file of 14 GB takes 28 GB of memory, its embedding
    lies there twice, or a small one waits for numba's compiler."""
    monkeypatch.setattr(load, "cpu_has_bf16", lambda: False)
    assert Llama.build(device="cpu").model.norm.weight.dtype == F32
    monkeypatch.setattr(load, "_COMPILED", 0)
    llama = Llama.build(device="cpu")
    kinds = {type(layer.kernel) for layers in llama.model.linear_groups() for layer in layers}
    assert kinds == {tiles.Bfloat16}
    assert llama.model.norm.weight.dtype == BF16
    assert llama.model.tok_embeddings(torch.tensor([1])).dtype == BF16
    exact = Llama.build(device="cpu", dtype=F32)
    prompts = [[1, 300, 301, 302]]
    ours, theirs = (each.model(torch.tensor(prompts), 0) for each in (llama, exact))
    torch.testing.assert_close(ours.float(), theirs, atol=0.3, rtol=0.1)


def test_large_int8_checkpoints_are_computed_in_bfloat16(
    plain_bf16: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A failure means that with AVX2 alone int8 decodes half as fast as it can."""
    convert(str(TINY), str(tmp_path / "int8"), quantize="int8")
    monkeypatch.setattr(load, "cpu_has_bf16", lambda: False)
    dtypes = []
    for compiled_from in (load._COMPILED, 0):
        monkeypatch.setattr(load, "_COMPILED", compiled_from)
        dtypes.append(Llama.build(str(tmp_path / "int8"), device="cpu").model.norm.weight.dtype)
    assert dtypes == [F32, BF16]


@pytest.mark.parametrize("n_tokens", [1, 4, 5, 32, 33, 200])
@pytest.mark.parametrize("shape", [(2048, 64), (4096, 128), (2080, 64)])
def test_rows_that_share_places_in_the_cache_are_padded(
    shape: tuple[int, int], n_tokens: int
) -> None:
    """A failure means that a padded weight gives other products, or comes back with its padding."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(shape, generator=generator).bfloat16()
    if not cpu.OneDnn.is_fastest_for(weight):
        pytest.skip("needs bfloat16 in hardware")
    kernel = cpu.OneDnn({"weight": weight})
    assert kernel._is_padded == (cpu_has_amx() and shape[0] != 2080)
    x = torch.randn(n_tokens, shape[1], generator=generator).bfloat16()
    out, expected = kernel.product(x), x.float() @ weight.float().T
    assert out.shape == expected.shape
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=0.05)
    assert torch.equal(kernel.stored()["weight"], weight)
    rows = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(kernel.weights(rows), weight[rows].float())


def test_the_compiler_is_told_how_a_padded_product_lies() -> None:
    """A failure means that ``compile=True`` fails for more sequences than compiled code takes."""
    weight = torch.randn(2048, 64).bfloat16()
    if not cpu.OneDnn.is_fastest_for(weight):
        pytest.skip("needs bfloat16 in hardware")
    kernel, x = cpu.OneDnn({"weight": weight}), torch.randn(40, 64).bfloat16()
    out = torch.compile(lambda x: kernel(x) + 1, backend="aot_eager")(x)
    torch.testing.assert_close(out, kernel(x) + 1)
    number = torch.tensor(kernel.number)
    assert torch.ops.llama.product(x, number, 2048).is_contiguous()
