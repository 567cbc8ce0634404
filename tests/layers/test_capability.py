"""What the processor can do, as far as it may be used."""

import pytest
import torch

from llama.layers.capability import cpu_abilities

UNITS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@pytest.mark.parametrize(
    ("settings", "operators", "expected"),
    [
        ({}, "AVX512", UNITS),
        ({"ONEDNN_MAX_CPU_ISA": "ALL"}, "AVX512", UNITS),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "AVX512", UNITS),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, "AVX512", UNITS[:4]),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "AVX512", UNITS[:3]),
        ({"ONEDNN_MAX_CPU_ISA": ""}, "AVX512", UNITS),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX512", UNITS[:1]),
        ({}, "AVX2", UNITS[:1]),
    ],
)
def test_settings_limit_what_is_used(
    settings: dict[str, str],
    operators: str,
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failure means that a weight gets an order for which PyTorch may not use the operators."""
    found = {**dict.fromkeys(UNITS, True), "cpu_name": "a name"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: operators)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    abilities = cpu_abilities()
    assert tuple(name for name in UNITS if abilities[name]) == expected
    assert abilities["cpu_name"] == "a name"
