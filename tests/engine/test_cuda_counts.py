"""What CUDA's way costs, counted on meta tensors: launches, waits, transfers, sizes."""

from collections import Counter
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import Launches, Waits
from torch import nn
from torch.nn.attention.bias import CausalBias

from llama import ModelArgs, Tokenizer, Transformer, parallel
from llama.engine import graphs
from llama.engine.engine import Engine
from llama.engine.graphs import DecodingSteps, decoding_steps
from llama.engine.sequence import Sequence
from llama.layers.attention import Sdpa
from llama.layers.batch import Segment
from llama.layers.varlen import Varlen
from llama.sampling import SamplingParams

CPU = torch.device("cpu")
LLAMA2_7B = {"dim": 4096, "n_heads": 32, "vocab_size": 32000}
LLAMA3_8B = {
    **{"dim": 4096, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256},
    **{"ffn_dim_multiplier": 1.3, "multiple_of": 1024, "rope_theta": 5e5},
}
CODE_LLAMA = {**LLAMA2_7B, "vocab_size": 32016, "rope_theta": 1e6, "max_seq_len": 100_352}


@pytest.fixture(autouse=True)
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.pretend(monkeypatch.setattr)


def meta_model(n_layers: int = 2, dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Transformer:
    """A network on the meta device with the kernels that CUDA would have."""
    parallel.initialize(torch.device("cpu"))
    args = ModelArgs(**{"max_seq_len": 4096, "max_batch_size": 8, "n_layers": n_layers, **shape})
    with torch.device("meta"):
        model = Transformer(args)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    backend = Varlen(args.max_seq_len)
    model.allocate_buffers(torch.device("meta"), dtype, backend=backend)
    model.pack()
    return model


def launches(model: Transformer, segments: list[Segment]) -> Counter[str]:
    tokens = torch.zeros(sum(s.length for s in segments), dtype=torch.long, device="meta")
    with Launches() as counted:
        model.forward_ragged(tokens, segments, tokens[:1])
    return counted.names


STEPS = {
    "one sequence": [Segment(3, 100, 1)],
    "eight of different lengths": [Segment(i, 100 + i, 1) for i in range(8)],
    "a draft": [Segment(0, 100, 1), Segment(5, 80, 6)],
    "a prompt": [Segment(0, 512, 512)],
    "a prompt beside decoding": [Segment(1, 100, 1), Segment(2, 90, 1), Segment(0, 512, 512)],
}


@pytest.mark.parametrize("shape", [LLAMA2_7B, LLAMA3_8B], ids=["7B", "8B"])
@pytest.mark.parametrize("name", STEPS)
def test_a_layer_launches_few_kernels(name: str, shape: dict[str, Any]) -> None:
    """A failure means that a GPU waits for launches: each takes as long as reading 10 MB."""
    few, more = (launches(meta_model(n, **shape), STEPS[name]) for n in (1, 3))
    per_layer = {op: (more[op] - few[op]) / 2 for op in more if more[op] != few[op]}
    is_mixed = name == "a prompt beside decoding"  # with two calls of attention
    assert sum(per_layer.values()) <= (21 if is_mixed else 18), per_layer
    assert sum(few.values()) - sum(per_layer.values()) <= 30, few  # outside of layers


@pytest.mark.parametrize("n_sequences", [1, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"logprobs": True, "top_p": 0.5},
        {"top_k": 5, "min_p": 0.1, "min_tokens": 30, "stop_token_ids": [2], "logit_bias": {5: 1}},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    ],
)
@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_step_waits_once_and_sends_once(
    is_recorded: bool, settings: dict[str, Any], n_sequences: int, tiny_tokenizer: Tokenizer
) -> None:
    """A failure means that a GPU idles several times a token, while the host waits for it."""
    model = meta_model(1, **LLAMA2_7B)
    engine = Engine(model, tiny_tokenizer)
    with Waits() as building:
        engine.decode = decoding_steps(model) if is_recorded else None
    assert not building.downloads
    params = SamplingParams(**settings)
    engine.submit(
        [
            Sequence([1, *range(i)], params, str(i), max_new_tokens=40, output="ids")
            for i in range(n_sequences)
        ]
    )
    for _ in range(4):
        with Waits():
            engine.step()
    n_steps = 6
    with Waits() as waits:
        for _ in range(n_steps):
            engine.step()
    assert waits.downloads == ["cpu"] * n_steps
    # Steps that are not recorded send their places on their own.
    assert waits.uploads == n_steps * (1 if is_recorded else 2)


def test_a_prompt_of_100_000_tokens_needs_no_mask(tiny_tokenizer: Tokenizer) -> None:
    """A failure means that memory ends where a long context begins."""
    model = meta_model(1, **{**CODE_LLAMA, "max_batch_size": 1})
    model.prefill_tokens = 8192
    engine = Engine(model, tiny_tokenizer)
    engine.submit([Sequence([1] * 100_000, max_new_tokens=1, output="ids")])
    passes = 0
    with Launches() as counted, Waits():
        while engine.n_running or engine.n_waiting:
            engine.step()
            passes += 1
    assert passes == 13  # of 8192 tokens at most
    assert counted.largest <= 8192 * 2 * model.params.hidden_dim
    # Where lengths can't be told, the kernel is told of the triangle instead.
    [span] = Sdpa("cuda", torch.float32).layout([Segment(0, 90_000, 8192)], CPU).calls
    assert isinstance(span.mask, CausalBias)


def test_a_whole_step_is_one_graph_for_the_compiler() -> None:
    """A failure means that compiled steps fall back to Python in the middle."""
    model = meta_model(2, **LLAMA3_8B)
    steps = DecodingSteps(model, compile=False)
    inputs = torch.zeros(3, 4, dtype=torch.long, device="meta")
    counts = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        counts.append(sum("flash" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(steps._step, fullgraph=True, dynamic=False, backend=backend)
    with torch.inference_mode():
        compiled(inputs, kv_len=1024)
    assert counts == [2]


def test_all_steps_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that the compiler gives up after some shapes, a lone stream's among them."""
    compile = torch.compile
    shapes: Counter[tuple[int, ...]] = Counter()
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        tensors = [x for x in examples if isinstance(x, torch.Tensor) and x.dim() == 2]
        shapes[min(len(x) for x in tensors),] += 1
        return graph.forward

    def counted(function: Any, dynamic: bool | None, options: Any) -> Any:
        assert options == {"coordinate_descent_tuning": True}
        compiled.append(function.__name__)
        return compile(function, dynamic=dynamic, backend=backend)

    class Graph(fake_cuda.ReplayedGraph):
        """Computes: while operators are recorded, nothing is compiled."""

        def __init__(self, step: Any, inputs: torch.Tensor, pool: Any):
            self._step = step

        def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
            return self._step(inputs)

    monkeypatch.setattr(graphs, "CudaGraph", Graph)
    monkeypatch.setattr(torch, "compile", counted)
    model = meta_model(2, **{**LLAMA3_8B, "max_seq_len": 5000})
    steps = DecodingSteps(model, compile=True)
    steps.prepare()
    n_lengths = len(steps.lengths)
    assert compiled == ["forward", "forward", "output_logits"]
    assert n_lengths == 4 and shapes.keys() == {(n,) for n in (1, 2, 4, 8, 16)}
    assert all(count >= n_lengths for count in shapes.values())
    before = shapes.total()
    with torch.compiler.set_stance("fail_on_recompile"):
        segments = [Segment(0, 4500, 1)]
        places = [torch.tensor(x, device="meta") for x in steps.places(segments)]
        steps(torch.zeros(1, dtype=torch.long, device="meta"), segments, *places)
    assert shapes.total() == before


def test_outside_the_network_a_batch_launches_what_a_lone_stream_does(
    tiny_tokenizer: Tokenizer,
) -> None:
    """A failure means that 64 streams wait for Python, each for its own part of the results."""

    def outside(n_sequences: int) -> int:
        model = meta_model(1, **{**LLAMA2_7B, "max_batch_size": 64})
        engine = Engine(model, tiny_tokenizer)
        engine.decode = decoding_steps(model)
        prompts = [Sequence([1, 2], seed=str(i), max_new_tokens=30) for i in range(n_sequences)]
        for prompt in prompts:
            prompt.output = "ids"
        engine.submit(prompts)
        with Waits():
            engine.step()
        with Launches() as counted, Waits():
            engine.step()
        return counted.names.total()

    # A lone stream's attention doubles its queries and drops half of what comes out.
    assert abs(outside(64) - outside(1)) <= 2
