"""What the tests share: the embedded model, random models and the tokenizers at hand."""

import gc
import json
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

# Small networks gain nothing by threads, and tests run side by side. Read when torch is imported,
# in the processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor else compiles a program for each instruction set of the processor, to see that it can,
# and starts processes for what it compiles on a GPU.
os.environ.update(TORCHINDUCTOR_VEC_ISA_OK="1", TORCHINDUCTOR_COMPILE_THREADS="1")
# Each client of httpx reads the world's certificates, which takes longer than most requests. A
# folder's are read when one is needed: none is, all addresses are http.
os.environ.update(SSL_CERT_FILE="", SSL_CERT_DIR=os.path.dirname(__file__))
import torch

from llama import Llama, ModelArgs, Tokenizer, Transformer, parallel
from llama.convert import convert
from llama.engine import runner
from llama.generation import TINY
from llama.layers.kernels import compiled
from llama.layers.kernels.machine_code import has_numba

pytest_plugins = ["browser_page"]  # the fixtures of the page's tests

# Begun first, so that no core waits for one of them at the end.
LONGEST = (
    *("test_parallel.py", "test_process.py", "test_examples.py", "test_api.py"),
    *("test_page.py", "test_page_core.py", "test_page_more.py", "test_clients.py"),
    *("test_cuda_adapters.py", "test_cuda_counts.py", "test_cuda_steps.py", "test_graphs.py"),
    *("test_readme.py", "test_download.py", "test_benchmarks.py", "test_quantization.py"),
    "test_tutorials.py",
)
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "vocab_size": 96}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Don't search modules and tests for garbage, which takes half a second each time."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.fixture(scope="session")
def tiny() -> Llama:
    """The embedded model in float32, where greedy ids don't depend on the batch."""
    return Llama.build(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("saved") / "model"
    convert(str(TINY), str(path), "hf")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(TINY / "tokenizer.model")


def make_model(seed: int = 0, **params: object) -> Transformer:
    """A small float32 Transformer with random weights; params override those of SMALL."""
    parallel.initialize(torch.device("cpu"))
    args = ModelArgs(**{"max_batch_size": 4, "max_seq_len": 128, **SMALL, **params})
    model = Transformer(args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.2, generator=generator)
    return model


@pytest.fixture
def needs_numba() -> None:
    pytest.importorskip("numba")
    if not has_numba():
        pytest.skip("numba's code is for x86 and Linux")


@pytest.fixture
def amx(needs_numba: None) -> Iterator[None]:
    """A processor with AMX, or functions in place of its instructions."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("the build lacks oneDNN")
    if compiled.HAS_AMX:
        yield
    elif compiled.HAS_VNNI:
        import fake_amx

        with fake_amx.processor():
            yield
    else:
        pytest.skip("the processor lacks AVX-512 VNNI")


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory in Meta's layout with a small random checkpoint."""

    def make(dtype: torch.dtype = torch.float32, name: str = "ckpt", **params: object) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        params = {**SMALL, "vocab_size": 768, **params}
        model = make_model(**params)
        tensors = {n: p.detach().to(dtype) for n, p in model.named_parameters()}
        torch.save(tensors, directory / "consolidated.00.pth")
        (directory / "params.json").write_text(json.dumps(params))
        (directory / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
        return directory

    return make


def follow_script(monkeypatch: pytest.MonkeyPatch, ids: Iterator[int]) -> None:
    """Let a lone sequence draw these tokens, one after another."""

    def finish(self: runner.Runner, started: runner.Pass) -> tuple[list[tuple[int, float]], bool]:
        return [(next(ids), 0.0) for piece in started.pieces for _ in range(piece.n_drawn)], False

    monkeypatch.setattr(runner.Runner, "finish", finish)


def passed_tokens(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of tokens of each forward pass."""
    passed: list[int] = []
    forward = llama.model.hidden_states

    def counted(tokens: torch.Tensor, *more: object) -> torch.Tensor:
        passed.append(len(tokens))
        return forward(tokens, *more)

    monkeypatch.setattr(llama.model, "hidden_states", counted)
    return passed


def data_tokenizer(name: str) -> Tokenizer:
    """One of the published tokenizers; the test is skipped where LLAMA_TEST_DATA isn't set."""
    folder = os.environ.get("LLAMA_TEST_DATA")
    if not folder:
        pytest.skip("LLAMA_TEST_DATA is not set")
    return Tokenizer(Path(folder) / f"{name}-tokenizer.model")


@pytest.fixture(scope="session")
def llama2_tokenizer() -> Tokenizer:
    return data_tokenizer("llama2")


@pytest.fixture(scope="session")
def codellama_tokenizer() -> Tokenizer:
    return data_tokenizer("codellama")


@pytest.fixture(scope="session")
def codellama_70b_tokenizer() -> Tokenizer:
    return data_tokenizer("codellama-70b-instruct")
