"""Decoding steps on a CPU, recorded and replayed."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import forked

from llama import Llama
from llama.engine import graphs
from llama.errors import NotFinite
from llama.layers.batch import Segment
from llama.layers.kernels import compiled, machine_code, tiles
from llama.layers.kernels import graphs as kernel_graphs
from llama.layers.kernels.openmp import in_parallel, recording
from llama.model import RMSNorm

WIDE = {"dim": 512, "n_heads": 8, "n_kv_heads": 2, "n_layers": 2}
PROMPTS = [[1, 300, 301], [1, *range(400, 430)], [1, 9], [1, *range(500, 505)]]


@pytest.fixture(autouse=True)
def small_weights(needs_numba: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILED", 1)


@pytest.fixture
def build(checkpoint_dir: Callable[..., Path]) -> Callable[..., Llama]:
    path = checkpoint_dir(torch.bfloat16, **WIDE)

    def make(**options: object) -> Llama:
        options = {"max_seq_len": 128, "max_batch_size": 4, **options}
        return Llama.build(path, device="cpu", dtype=torch.bfloat16, **options)

    return make


def steps_of(llama: Llama) -> graphs.DecodingSteps:
    assert llama.engine.decode is not None
    return llama.engine.decode


def decode(
    llama: Llama, ids: list[int], segments: list[Segment], looks: bool = True
) -> torch.Tensor:
    steps = steps_of(llama)
    steps.look_again(looks)
    if not looks:  # as in the middle of a call
        steps._pool.n_looks -= 1
    assert steps.supports(segments)
    return steps(torch.tensor(ids), segments, *map(torch.tensor, steps.places(segments)))


def check(llama: Llama, ids: list[int], segments: list[Segment]) -> None:
    """Check that a step has the network's own logits, whether it is recorded or replayed."""
    expected = llama.model.forward_ragged(torch.tensor(ids), segments)
    for _ in range(kernel_graphs._OFTEN + 1):
        assert torch.equal(decode(llama, ids, segments), expected)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_steps_have_the_networks_logits(build: Callable[..., Llama], quantize: str | None) -> None:
    """A failure means other tokens than those of the network as it is."""
    llama = build(quantize=quantize, **({"group_size": 32} if quantize == "int4" else {}))
    llama.generate(PROMPTS, 1)
    check(llama, [7], [Segment(2, 2, 1)])
    check(llama, [7, 8, 9], [Segment(0, 3, 1), Segment(3, 6, 1), Segment(1, 31, 1)])
    check(llama, [5, 6, 7, 8], [Segment(1, 31, 4)])  # a draft
    check(llama, [9], [Segment(1, 40, 1)])  # another position
    check(llama, [5] * 12, [Segment(0, 3, 12)])


def test_the_engine_replays_and_has_the_tokens_that_it_has_without(
    build: Callable[..., Llama],
) -> None:
    """A failure means that steps wait for Python, or that tokens change with the way there."""
    llama, other = build(), build()
    other.engine.decode = None
    prompts = [*PROMPTS, *(prompt[:0:-1] for prompt in PROMPTS)]  # four wait for a slot
    replayed = llama.generate(prompts, 24, temperature=0, logprobs=True)
    assert {n for n, _ in steps_of(llama)._graphs} == {1, 4}
    assert other.generate(prompts, 24, temperature=0, logprobs=True) == replayed
    two = [PROMPTS[0], PROMPTS[3]]
    assert other.generate(two, 9, temperature=0) == llama.generate(two, 9, temperature=0)
    assert {n for n, _ in steps_of(llama)._graphs} == {1, 2, 4}


def test_steps_beyond_compiled_attention_are_the_networks_own(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that a long text's steps attend to a part of it."""
    monkeypatch.setattr(graphs, "MOST_POSITIONS", 40)
    llama = build()
    assert steps_of(llama).supports([Segment(0, 39, 1)])
    assert not steps_of(llama).supports([Segment(0, 40, 1)])
    assert not steps_of(llama).supports([Segment(0, 3, compiled.FEW_TOKENS + 1)])
    found = llama.generate(PROMPTS, 24, temperature=0)
    llama.engine.decode = None
    llama.reset_cache()  # so that prompts are read as before
    assert llama.generate(PROMPTS, 24, temperature=0) == found


def test_a_prompt_in_pieces(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that a long prompt crashes, or is read otherwise than a short one."""
    llama, prompt = build(), [1, *range(300, 400)]
    expected = llama.generate([prompt], 4, temperature=0)
    monkeypatch.setattr(llama.model, "prefill_tokens", 40)
    llama.reset_cache()
    assert llama.generate([prompt], 4, temperature=0) == expected


def test_several_sequences_are_replayed_without_python(build: Callable[..., Llama]) -> None:
    """A failure means that each layer's products of some sequences wait for Python."""
    llama = build(max_batch_size=8)
    segments = [Segment(slot, 3, 1) for slot in range(8)]
    check(llama, [*range(5, 13)], segments)
    graph = list(steps_of(llama)._graphs.values())[-1]  # the others are of one token
    assert len(graph._parts) == 1


@pytest.mark.parametrize("change", ["weights", "norm", "data", "module", "cache", "threads"])
def test_a_network_that_has_changed_is_recorded_again(
    build: Callable[..., Llama], change: str
) -> None:
    """A failure means that steps read the weights that a network had before, or freed memory."""
    llama, before = build(), torch.get_num_threads()
    model = llama.model
    llama.generate(PROMPTS, 2)
    decode(llama, [7], [Segment(0, 0, 1)])
    try:
        if change == "weights":
            model.load_state_dict({n: w * 1.5 for n, w in model.state_dict().items()})
        elif change == "norm":
            weight = torch.full_like(model.layers[1].ffn_norm.weight, 3)
            model.layers[1].ffn_norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        elif change == "data":
            model.norm.weight.data = torch.full_like(model.norm.weight, 3)
        elif change == "module":
            weight = torch.full((512,), 3.0, dtype=torch.bfloat16)
            model.norm = RMSNorm(512, 1e-5)
            model.norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        elif change == "cache":
            model.allocate_buffers(torch.device("cpu"), torch.bfloat16)
        else:
            torch.set_num_threads(before + 2)
        check(llama, [7], [Segment(0, 0, 1)])
    finally:
        torch.set_num_threads(before)


def test_what_changes_within_a_stream_is_noticed(build: Callable[..., Llama]) -> None:
    """A failure means that a caller who steers a stream gets the tokens of earlier weights."""
    found: dict[bool, list[int]] = {}
    for is_recorded in (True, False):
        llama, seen = build(), []
        if not is_recorded:
            llama.engine.decode = None
        llama.text_completion(["Once"], temperature=0, max_gen_len=4)
        norm = llama.model.norm
        stream = llama.text_completion_stream("Once", temperature=0, max_gen_len=24)
        found[is_recorded] = [token for _ in range(4) for token in next(stream).token_ids]
        norm.weight = torch.nn.Parameter(-norm.weight, requires_grad=False)
        found[is_recorded] += next(stream).token_ids
        hook = norm.register_forward_hook(lambda *args, seen=seen: seen.append(args[2].shape))
        found[is_recorded] += next(stream).token_ids
        hook.remove()
        found[is_recorded] += [token for piece in stream for token in piece.token_ids]
        assert seen
    assert found[True] == found[False]


def test_what_is_not_noticed_is_not_freed(build: Callable[..., Llama]) -> None:
    """A failure means that a step reads memory that belongs to something else by now."""
    llama, segments = build(), [Segment(0, 0, 1), Segment(1, 0, 1)]
    model = llama.model
    for _ in range(kernel_graphs._OFTEN - 1):
        decode(llama, [7, 8], segments, looks=False)
    weights = {name: weight * 1.5 for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)
    kernels = [weakref.ref(layer.feed_forward.w2.kernel) for layer in model.layers]
    expected = model.forward_ragged(torch.tensor([7, 8]), segments)
    assert torch.equal(decode(llama, [7, 8], segments, looks=False), expected)
    model.load_state_dict({name: weight * 1.5 for name, weight in weights.items()})
    gc.collect()
    assert all(kernel() is not None for kernel in kernels)
    assert not torch.equal(decode(llama, [7, 8], segments, looks=False), expected)  # norms are new
    check(llama, [7, 8], segments)
    assert all(kernel() is None for kernel in kernels)


def test_hooks_see_every_step(build: Callable[..., Llama]) -> None:
    """A failure means that someone who looks at activations sees none while tokens are decoded."""
    llama, seen = build(), []
    llama.generate(PROMPTS[:1], 4, temperature=0)
    layer = llama.model.layers[1]
    hook = layer.register_forward_hook(lambda *args: seen.append(args[2]))
    found = llama.generate(PROMPTS[:1], 4, temperature=0)
    assert len(seen) == 4 and seen[-1].shape == (1, 512)
    hook.remove()
    assert llama.generate(PROMPTS[:1], 4, temperature=0) == found
    assert len(seen) == 4


def test_what_hooks_change_is_not_recorded(build: Callable[..., Llama]) -> None:
    """A failure means that a change of activations lasts after its hook was removed."""
    llama, segments = build(), [Segment(0, 3, 1), Segment(1, 6, 1)]
    llama.generate(PROMPTS, 1)
    hook = llama.model.layers[1].register_forward_hook(lambda *args: args[2] * -3)
    steered = llama.model.forward_ragged(torch.tensor([7, 8]), segments)
    for _ in range(kernel_graphs._OFTEN + 1):
        assert torch.equal(decode(llama, [7, 8], segments), steered)
    hook.remove()
    assert not torch.equal(decode(llama, [7, 8], segments), steered)
    check(llama, [7, 8], segments)


def test_a_step_that_takes_too_much_memory_is_not_kept(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that copies of all weights stay, where a kernel widens these."""
    monkeypatch.setattr(kernel_graphs, "_MOST", 1 << 10)
    llama = build()
    check(llama, [7], [Segment(0, 0, 1)])
    check(llama, [7], [Segment(0, 1, 1)])
    [graph] = steps_of(llama)._graphs.values()
    assert graph._parts is None and recording.calls is None


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_graphs_share_memory(build: Callable[..., Llama], quantize: str | None) -> None:
    """A failure means that a server's memory grows with each number of streams."""
    llama = build(quantize=quantize, **({"group_size": 32} if quantize == "int4" else {}))
    llama.generate(PROMPTS, 1)
    check(llama, [7] * 12, [Segment(1, 31, 12)])
    memory, sizes = steps_of(llama)._pool, []
    for n in range(1, 12):
        check(llama, [7] * n, [Segment(1, 31, n)])
        sizes.append(sum(map(len, memory._chunks)))
    assert sizes[0] == sizes[-1] > 0
    check(llama, [9] * 12, [Segment(1, 31, 12)])
    model = llama.model
    shared = [*memory._chunks, *model.buffers(), *(x for x in model.parameters() if x.numel())]
    known = {x.untyped_storage().data_ptr() for x in shared}
    for graph in steps_of(llama)._graphs.values():
        known.add(graph._inputs.untyped_storage().data_ptr())
        own = {x.untyped_storage().data_ptr(): x for x in graph._kept if x.numel()}
        sizes = [x.nbytes for place, x in own.items() if place not in known]
        assert sum(sizes) < 1000, sizes


def test_an_interrupted_record_is_not_replayed(build: Callable[..., Llama]) -> None:
    """A failure means that steps read freed weights after Ctrl-C."""
    llama = build()
    model, segments = llama.model, [Segment(0, 0, 1)]
    decode(llama, [7], segments)
    model.load_state_dict({n: w * 1.5 for n, w in model.state_dict().items()})
    original = model.layers[1].forward

    def interrupt(*args: object) -> torch.Tensor:
        raise KeyboardInterrupt

    model.layers[1].forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        decode(llama, [7], segments)
    assert recording.calls is None
    model.layers[1].forward = original
    check(llama, [7], segments)


def test_a_model_that_is_let_go_leaves_memory_at_once(build: Callable[..., Llama]) -> None:
    """A failure means that the next model may not fit beside it."""
    llama = build()
    llama.generate(PROMPTS[:1], 4)
    model = weakref.ref(llama.model)
    gc.disable()
    try:
        del llama
        assert model() is None
    finally:
        gc.enable()


def test_a_copy_has_steps_of_its_own(build: Callable[..., Llama]) -> None:
    llama = build()
    llama.generate(PROMPTS[:1], 2)
    other = copy.deepcopy(llama.model)
    with torch.no_grad():
        other.norm.weight.mul_(2)
    check(llama, [7], [Segment(0, 0, 1)])
    steps = graphs.decoding_steps(other)
    assert steps is not None
    segments = [Segment(0, 0, 1)]
    places = map(torch.tensor, steps.places(segments))
    doubled = steps(torch.tensor([7]), segments, *places)
    assert torch.equal(doubled, other.forward_ragged(torch.tensor([7]), segments))
    assert not torch.equal(doubled, decode(llama, [7], segments))


def test_what_is_not_compiled_is_not_recorded(
    build: Callable[..., Llama], checkpoint_dir: Callable[..., Path]
) -> None:
    """A failure means that a step reads numbers as those of another form."""
    assert build(kv_cache_dtype="int8").engine.decode is None
    assert Llama.build(device="cpu", dtype=torch.bfloat16).engine.decode is None  # a narrow one
    path = checkpoint_dir(torch.float32, name="float32", **WIDE)
    assert Llama.build(path, device="cpu", dtype=torch.float32).engine.decode is None


def test_not_a_number_is_reported(build: Callable[..., Llama]) -> None:
    llama = build()
    llama.generate(PROMPTS[:1], 4, temperature=0)
    with torch.no_grad():
        llama.model.layers[0].ffn_norm.weight.fill_(torch.nan)
    with pytest.raises(NotFinite, match="not finite"):
        llama.generate(PROMPTS[:1], 4, temperature=0)


def test_calls_are_recorded_in_their_thread_and_order() -> None:
    """A failure means that a replay computes what another thread did, or in another order."""
    code = machine_code.code("numba_tokens", "add")
    x = torch.ones(8, 512, dtype=torch.bfloat16)
    outs = [torch.zeros_like(x) for _ in range(3)]

    def add(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> None:
        in_parallel(code.address, *(t.data_ptr() for t in (first, second, out)), *x.shape)

    recording.calls = calls = []
    try:
        add(x, x, outs[0])
        other = threading.Thread(target=add, args=(x, x, outs[2]))
        other.start()
        other.join()
        add(outs[0], outs[0], outs[1])
    finally:
        recording.calls = None
    add(x, x, outs[2])
    assert [out[0, 0].item() for out in outs] == [2, 4, 2]
    assert len(calls) == 2
    x.fill_(3)
    for out in outs:
        out.fill_(7)
    [replay] = kernel_graphs._parts(calls)
    replay()
    assert [out[0, 0].item() for out in outs] == [6, 12, 7]


def test_recording_imports_no_compiler(checkpoint_dir: Callable[..., Path]) -> None:
    """A failure means that a first token waits a second for PyTorch's compiler to be imported."""
    path = checkpoint_dir(torch.bfloat16, **WIDE)
    code = (
        "import sys, torch; from llama import Llama\n"
        "llama = Llama.build(sys.argv[1], device='cpu', dtype=torch.bfloat16, max_seq_len=64)\n"
        "llama.generate([[1, 2]], 3)\n"
        "print(len(llama.engine.decode._graphs), 'torch._dynamo' in sys.modules)"
    )
    done = forked("-c", code, str(path))
    assert done.stdout.split() == ["1", "False"], done.stdout + done.stderr
