"""The choice of an attention backend: by trial, and told."""

import math
from typing import Any

import fake_cuda
import pytest
import torch

from llama import ModelArgs, parallel
from llama.checkpoint.backend import choose_backend
from llama.layers.attention import Backend, Sdpa
from llama.layers.capability import Capability
from llama.layers.varlen import Varlen

parallel.initialize(torch.device("cpu"))


def choose(
    dtype: torch.dtype = torch.bfloat16, int8: bool = False, capability: Capability | None = None
) -> Backend:
    args = ModelArgs(dim=64, n_heads=4, n_kv_heads=2, vocab_size=96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Capability, "of", staticmethod(lambda device: capability or fake_cuda.H100))
        return choose_backend(args, 1, dtype, torch.device("cpu"), int8)


def test_the_choice_of_a_backend() -> None:
    """A failure means that a GPU takes a kernel which it lacks, or never its fastest one."""
    assert isinstance(choose(), Varlen)
    old = Capability("cuda", (7, 5))
    for backend in (choose(int8=True), choose(capability=old), choose(capability=Capability())):
        assert isinstance(backend, Sdpa)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


FAULTS = ["wrong", "missing", "unwritten", "wrong in decoding", "wrong in long texts"]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_operator_that_is_wrong_here_is_not_used_and_that_is_said(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means garbage on a GPU whose kernel has a fault: no signature tells it."""
    real = torch.ops.aten._flash_attention_forward

    def broken(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if fault == "missing":
            raise RuntimeError("this build has no FlashAttention")
        out, *others = real(q, *args, **kwargs)
        if fault == "unwritten":
            out[-1] = math.nan
        max_q, max_k = args[4:6]
        is_wrong = {
            "wrong": True,
            "wrong in decoding": max_q == 1 and len(q) == 1,
            "wrong in long texts": max_k > 512,
        }
        return out * 1.2 if is_wrong.get(fault) else out, *others

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", broken)
    with caplog.at_level("INFO", "llama.checkpoint.backend"):
        assert isinstance(choose(), Sdpa)
    expected = {"missing": "no FlashAttention", "unwritten": "wrong by nan"}
    assert (
        expected.get(fault, "wrong by") in caplog.text
        and "scaled_dot_product_attention" in caplog.text
    )
