"""The types of GGUF files as affine groups: the weights are those of gguf's own dequantiser."""

from collections.abc import Callable
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import random_blocks

from llama.checkpoint import gguf_codes
from llama.checkpoint.gguf_codes import KINDS, codes_of, form_of_kind
from llama.checkpoint.gguf_file import SUPPORTED

SHAPE = (24, 768)

# A scale's bytes are written twice, for those that GGUF calls d and m: each of a pair is random.
SCALES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "usual": lambda rng, shape: rng.uniform(1e-4, 1e-2, shape),
    "negative": lambda rng, shape: -rng.uniform(1e-4, 1e-2, shape),
    "largest": lambda rng, shape: rng.choice([-65504.0, 65504.0], shape),
    "subnormal": lambda rng, shape: rng.integers(-1023, 1024, shape) * 2.0**-24,
    "zero": lambda rng, shape: np.zeros(shape),
    "mixed": lambda rng, shape: np.ldexp(rng.uniform(-1, 1, shape), rng.integers(-20, 15, shape)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scales", SCALES)
def test_codes_give_the_weights_of_ggufs_dequantiser(name: str, scales: str) -> None:
    """A failure means that a file's weights are others here than in llama.cpp."""
    kind, rng = Kind[name], np.random.default_rng(0)
    raw = random_blocks(kind, SHAPE, rng, lambda shape: SCALES[scales](rng, shape))
    stored = codes_of(name, torch.from_numpy(raw).flatten(), SHAPE)
    form = form_of_kind(name)
    assert form is not None
    assert {part: tensor.dtype for part, tensor in stored.items()} == form.dtypes()
    assert {part: tuple(tensor.shape) for part, tensor in stored.items()} == form.shapes(*SHAPE)
    weight = form.dequantize(stored)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    if not form.has_zeros:  # value times scale has one rounding at most
        assert torch.equal(weight, expected)
        return
    # Minimum and codes' middle make one zero, with a rounding of its own: an ulp of the larger.
    groups = (weight.unflatten(1, (-1, form.group_size)), expected.view(-1, form.group_size))
    largest = 16 * stored["scales"].abs() + stored["zeros"].abs()
    error = (groups[0].flatten(0, 1) - groups[1]).abs().amax(dim=1)
    assert bool((error <= largest.flatten() * 2**-23).all())


@pytest.mark.parametrize("name", [name for name, (form, *_) in KINDS.items() if form.has_zeros])
def test_zeros_of_usual_scales_are_exact(name: str) -> None:
    """A failure means that a minimum is taken from the wrong place, or rounded without need."""
    kind, rng = Kind[name], np.random.default_rng(0)
    raw = random_blocks(kind, SHAPE, rng, lambda shape: rng.uniform(1, 2, shape) * 1e-3)
    form = KINDS[name][0]
    weight = form.dequantize(codes_of(name, torch.from_numpy(raw).flatten(), SHAPE))
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert (weight - expected).abs().max() <= torch.finfo(torch.float32).eps * expected.abs().max()
    assert (weight == expected).float().mean() > 0.9


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_zeros_of_weights_around_zero_are_small(name: str) -> None:
    """A failure means that zeros in bfloat16 cost more than weights in bfloat16 would."""
    form = KINDS[name][0]
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    raw = gguf.quants.quantize(weight.numpy(), Kind[name])
    stored = codes_of(name, torch.from_numpy(raw).flatten(), (64, 256))
    expected = form.dequantize(stored)
    half = replace(form, scale_dtype=torch.bfloat16)
    stored |= {part: stored[part].bfloat16() for part in half.scale_names}
    error = half.dequantize(stored) - expected
    assert error.norm() / expected.norm() < 1.2 * 2**-9


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_weights_are_decoded_some_at_a_time(
    name: str, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that blocks of large weights are mixed up, lost or left out."""
    raw = torch.from_numpy(random_blocks(Kind[name], SHAPE, np.random.default_rng(0))).flatten()
    whole = codes_of(name, raw, SHAPE)
    monkeypatch.setattr(gguf_codes, "_CHUNK", 1280)  # not a divisor of the weights
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        parts = codes_of(name, raw, SHAPE)
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(whole[part], parts[part]) for part in whole)


@pytest.mark.parametrize("name", KINDS)
def test_a_block_of_its_own_is_decoded(name: str) -> None:
    """A failure means that a weight isn't read if one block is left after all whole chunks."""
    kind, shape = Kind[name], (1, KINDS[name][1])
    raw = random_blocks(kind, shape, np.random.default_rng(0))
    weight = KINDS[name][0].dequantize(codes_of(name, torch.from_numpy(raw).flatten(), shape))
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    torch.testing.assert_close(weight, expected)


def test_all_types_that_gguf_dequantises_are_read() -> None:
    """A failure means that files are refused whose weights are known."""
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            assert kind.name not in SUPPORTED
        else:
            assert kind.name in SUPPORTED


def test_other_types_have_no_form() -> None:
    """A failure means that weights of another kind are read as affine groups."""
    assert all(form_of_kind(name) is None for name in ("F16", "IQ2_XS", "TQ1_0", "MXFP4", "I32"))
    sizes = {name: gguf.GGML_QUANT_SIZES[Kind[name]][0] for name in KINDS}
    assert sizes == {name: block for name, (_, block, _) in KINDS.items()}
