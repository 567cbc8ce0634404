"""GPTQ's and AWQ's weights: codes of four or eight bits, packed in int32, and groups of inputs."""

from collections.abc import Mapping
from typing import Any

from llama.checkpoint.packed import Modules, Packed


def read_gptq(settings: Mapping[str, Any], modules: Modules, source: str) -> dict[str, Packed]:
    raise NotImplementedError


def read_awq(settings: Mapping[str, Any], modules: Modules, source: str) -> dict[str, Packed]:
    raise NotImplementedError
