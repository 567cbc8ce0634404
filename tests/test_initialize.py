"""Connecting the processes: which backend, which GPU, and what is refused. CUDA is pretended."""

import json
from pathlib import Path

import pytest
import torch
from processes import forked, script

from llama import parallel

PRETEND = """
import json, os, sys, torch
import torch.distributed as dist
from llama import Llama, parallel
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.set_device = lambda device: None
dist.is_nccl_available = lambda: False
found = {}
def attempt(name, call):
    try:
        found[name] = str(call())
    except ValueError as error:
        found[name] = "ValueError: " + str(error)
"""


class Connected(Exception):
    """A process group was asked for."""


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    """Returns the backend that ``initialize`` would connect some processes with."""

    def init(backend: str, **more: object) -> None:
        raise Connected(backend)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(parallel.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(parallel.dist, "init_process_group", init)

    def find(device: str | None, **environment: str) -> str:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Connected) as connected:
            parallel.initialize(parallel.detect_device(device))
        return str(connected.value)

    return find


ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TWO_NODES = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("device", "environment", "expected"),
    [
        (None, {}, "gloo"),
        ("cuda:1", {}, "gloo"),
        (None, ONE, "gloo"),
        ("cuda:1", ONE, "gloo"),
        (None, TWO, "nccl"),
        ("cuda", TWO, "nccl"),
        ("cpu", TWO, "gloo"),
        ("cuda:0", TWO_NODES, "nccl"),
    ],
)
def test_only_several_processes_with_gpus_need_nccl(
    device: str | None, environment: dict[str, str], expected: str, backend
) -> None:
    """A failure means that Windows can't use its GPU, or that several GPUs talk through CPUs."""
    assert backend(device, **environment) == expected


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", torch.device("cuda:0")])
def test_a_gpus_number_for_all_processes_of_a_machine_is_refused(
    device: str | torch.device, backend
) -> None:
    """They would all take the same GPU, which NCCL reports late."""
    with pytest.raises(ValueError, match=r"device is 'cuda:\d' in every process.*device='cuda'"):
        backend(device, **TWO)


def test_several_gpus_without_nccl_are_told_what_to_do(backend, monkeypatch) -> None:
    monkeypatch.setattr(parallel.dist, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match=r"need NCCL.*start one process.*'cpu'.*'gloo'"):
        backend(None, **TWO)


def test_more_processes_than_gpus_are_refused(backend, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"process 1 .* there are 1: start fewer processes"):
        backend(None, **TWO)


@pytest.mark.slow
def test_one_process_with_a_gpu_connects_without_nccl() -> None:
    code = PRETEND + (
        "assert parallel.initialize() == 1 and parallel.can_capture()\n"
        "print(dist.get_backend(), parallel.detect_device())"
    )
    done = forked("-c", code)
    assert (done.returncode, done.stdout) == (0, "gloo cuda:0\n"), done.stderr


RANKS = """
attempt("a number", lambda: Llama.build(device="cuda:0"))
attempt("no nccl", lambda: Llama.build())
dist.init_process_group("gloo")  # a script's own choice
attempt("own gpus", parallel.detect_device)
attempt("one gpu", lambda: parallel.initialize(parallel.detect_device("cuda:0")))
attempt("capture by gloo", parallel.can_capture)
attempt("cpu by gloo", lambda: parallel.initialize(torch.device("cpu")))
dist.get_backend = lambda group=None: "nccl"
attempt("cpu by nccl", lambda: parallel.initialize(torch.device("cpu")))
attempt("capture by nccl", parallel.can_capture)
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_processes_are_told_the_same_and_share_a_gpu_by_gloo(tmp_path: Path) -> None:
    """Where one alone raises, the other waits for it."""
    out = str(tmp_path / "rank")
    done = forked(script(tmp_path, PRETEND + RANKS), out, n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads(Path(f"{out}{rank}").read_text())
        assert "ValueError: device is 'cuda:0' in every process" in found.pop("a number")
        assert "ValueError: several processes with GPUs need NCCL" in found.pop("no nccl")
        assert "connected by nccl, which is for GPUs" in found.pop("cpu by nccl")
        assert found == {
            "own gpus": f"cuda:{rank}",
            "one gpu": "2",
            "capture by gloo": "False",
            "cpu by gloo": "2",
            "capture by nccl": "True",
        }


def test_graphs_are_released_before_a_process_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that ranks over NCCL wait forever at their end: it waits for graphs."""
    order: list[str] = []

    class Graph:
        def reset(self) -> None:
            order.append("reset")

    graph = Graph()
    monkeypatch.setattr(parallel, "graphs", {graph})
    monkeypatch.setattr(parallel, "destroy_model_parallel", lambda: order.append("leave"))
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: order.append("leave"))
    parallel._leave()
    assert order == ["reset", "leave", "leave"]
