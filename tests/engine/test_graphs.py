"""Compiled decoding steps: the same tokens, and no compiling between them."""

import logging
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from engine_client import check_sequences_come_and_go

from llama import Llama
from llama.checkpoint import pretrained
from llama.checkpoint.backend import check_compiler
from llama.engine import graphs
from llama.layers.batch import Segment
from llama.layers.capability import Capability
from llama.layers.kernels import cpu
from llama.layers.linear import ParallelLinear


def decode(steps: graphs.DecodingSteps, ids: list[int], segments: list[Segment]) -> torch.Tensor:
    return steps(torch.tensor(ids), segments, *map(torch.tensor, steps.places(segments)))


PROMPTS = [[1, 300, 301], [1, *range(400, 430)], [1, 9], [1, *range(500, 505)], [1, 2, 3]]


@pytest.fixture(scope="module")
def compiled() -> Llama:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    log = logging.getLogger("llama.engine.graphs")
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    llama = Llama.build(dtype=torch.float32, device="cpu", max_batch_size=4, compile=True)
    log.removeHandler(handler)
    assert any("prepared decoding steps in" in line for line in heard)
    return llama


@pytest.mark.slow
def test_the_tokens_are_those_of_the_network_as_it_is(compiled: Llama, tiny: Llama) -> None:
    for seed, temperature in ((0, 0.0), (1, 0.8)):
        found = compiled.generate(PROMPTS, 24, temperature, seed=seed, logprobs=True)
        plain = tiny.generate(PROMPTS[:4], 24, temperature, seed=seed, logprobs=True)
        assert found[0][:4] == plain[0]
        assert found[1] is not None and plain[1] is not None
        for ours, theirs in zip(found[1], plain[1], strict=False):
            assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_steps_compile_nothing_more(compiled: Llama) -> None:
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.generate([p[::-1] for p in PROMPTS], 40, temperature=0)
        compiled.generate([[1, 77]], 60, temperature=0)
        with pytest.raises(RuntimeError):  # the stance would tell
            torch.compile(lambda x: x + 1)(torch.ones(2))


@pytest.mark.slow
def test_biases_are_in_compiled_steps_too(checkpoint_dir: Callable[..., Path]) -> None:
    """A failure means that a network with biases answers otherwise where its steps are compiled."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    path = checkpoint_dir(n_kv_heads=2, n_layers=1, attention_bias=True, mlp_bias=True)
    how = {"device": "cpu", "dtype": torch.float32, "max_batch_size": 1}
    rows = [
        Llama.build(path, compile=compiles, **how).generate(PROMPTS[:1], 24, temperature=0)
        for compiles in (True, False)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_the_server_takes_compiled_steps(compiled: Llama) -> None:
    """Which write into rows that bring no token: none of these may lose anything by it."""
    check_sequences_come_and_go(compiled)


@pytest.mark.slow
def test_slots_without_a_new_token_keep_their_cache(compiled: Llama) -> None:
    """Slots 1 and 3 of four go on while 0 and 2 wait, then those two."""
    model, steps = compiled.model, compiled.engine.decode
    assert steps is not None
    tokens = torch.tensor([[1, 5, 9], [1, 6, 9], [1, 7, 9], [1, 8, 9]])
    found = []
    for is_compiled in (False, True):
        model.forward(tokens)
        for slots, ids in (([1, 3, 2], [20, 21, 24]), ([0, 2], [22, 23])):
            segments = [Segment(slot, 3, 1) for slot in slots]
            plain = None if is_compiled else model.forward_ragged(torch.tensor(ids), segments)
            found.append(decode(steps, ids, segments) if plain is None else plain)
    for plain, ours in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_packed_weights_are_read_by_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.OneDnn, "is_fastest_for", lambda weight: True)
    llama = Llama.build(dtype=torch.float32, device="cpu", max_batch_size=1, compile=True)
    model, steps = llama.model, llama.engine.decode
    assert steps is not None
    assert all(layer.kernel for layer in model.modules() if isinstance(layer, ParallelLinear))
    found = []
    segments = [Segment(0, 31, 1)]
    for is_compiled in (False, True):
        model.forward(torch.tensor([PROMPTS[1]]))
        plain = None if is_compiled else model.forward_ragged(torch.tensor([7]), segments)
        found.append(decode(steps, [7], segments) if plain is None else plain)
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    assert not torch.equal(found[1], torch.zeros_like(found[1]))


@pytest.mark.slow
@pytest.mark.parametrize("plain_kernels", [False, True])
def test_quantised_layers_are_compiled(plain_kernels: bool, checkpoint_dir, monkeypatch) -> None:
    if plain_kernels:  # the way of devices without one of their own
        monkeypatch.setattr(cpu, "int8_kernel", lambda weight: None)
    path = checkpoint_dir(n_layers=1)
    how = {"dtype": torch.float32, "device": "cpu", "max_batch_size": 1, "quantize": "int8"}
    plain, found = Llama.build(path, **how), Llama.build(path, **how, compile=True)
    expected, _ = plain.generate(PROMPTS[:1], 12, temperature=0)
    assert found.generate(PROMPTS[:1], 12, temperature=0)[0] == expected


@pytest.mark.slow
def test_compiled_models_are_freed_at_once() -> None:
    model = make_model(max_batch_size=1)
    steps = graphs.DecodingSteps(model, compile=True)
    gone = weakref.ref(model)
    del model, steps
    assert gone() is None


def test_a_machine_without_a_compiler_is_told_so(monkeypatch) -> None:
    """Before its weights are read, which can take minutes."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(pretrained, "open_checkpoint", lambda path: pytest.fail("it was read"))
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler.*install one.*or leave compile out"):
        Llama.build(device="cpu", compile=True)


def test_other_devices_are_told_what_is_missing(monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="MPS"):
        check_compiler(Capability("mps"))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="needs Triton"):
        check_compiler(Capability("cuda"))


@pytest.mark.parametrize("max_seq_len", [16, 300])
def test_what_prompts_compile_is_compiled_while_building(
    max_seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that the first prompt waits for a compiler, its output's product included."""
    model = make_model(max_seq_len=max_seq_len)
    model.capability = replace(model.capability, compiles=True)
    monkeypatch.setattr(graphs.DecodingSteps, "__init__", lambda *args: None)
    monkeypatch.setattr(graphs.DecodingSteps, "prepare", lambda self: None)
    shapes = []
    forward = model.forward_ragged

    def counted(*args: Any) -> torch.Tensor:
        shapes.append((len(args[0]), len(forward(*args))))
        return forward(*args)

    monkeypatch.setattr(model, "forward_ragged", counted)
    assert graphs.decoding_steps(model, compile=True) is not None
    assert shapes == [(min(256, max_seq_len), 1)]
