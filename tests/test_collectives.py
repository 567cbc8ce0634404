"""Ranks' collectives: NCCL's rules are kept, and a compiler sees all of them in one graph."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, make_model
from processes import script, torchrun
from strict_group import BrokenRule, StrictGroup

from llama import parallel
from llama.checkpoint.save import save

CPU = torch.device("cpu")
HERE = str(Path(__file__).parent)
OPS = torch.ops._c10d_functional


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def group() -> str:
    """The name of a group of one rank."""
    parallel.initialize(CPU)
    return dist.group.WORLD.group_name


def test_the_strict_group_refuses_strided_tensors(group: str) -> None:
    """Else nothing would tell before NCCL does, on a machine with several GPUs."""
    strided = torch.ones(4, 6)[:, :3]
    for call in (
        lambda: dist.all_reduce(strided),
        lambda: OPS.all_reduce_(strided, "sum", group),
        lambda: OPS.all_gather_into_tensor(strided, 1, group),
    ):
        wrong = r"\(4, 3\) with strides \(6, 1\) isn't contiguous"
        with pytest.raises(BrokenRule, match=wrong), StrictGroup(CPU):
            call()
    with StrictGroup(CPU) as strict:
        dist.broadcast(strided.contiguous(), src=0)
        OPS.wait_tensor(OPS.all_reduce_(strided.contiguous(), "sum", group))
    assert ["broadcast" in call for call in strict.calls] == [True, False]


def test_the_strict_group_refuses_tensors_of_other_devices(group: str) -> None:
    with pytest.raises(BrokenRule, match="on cpu, not cuda:0"), StrictGroup(torch.device("cuda:0")):
        dist.broadcast(torch.ones(2), src=0)


def test_the_strict_group_refuses_results_that_nobody_waited_for(group: str) -> None:
    results = []
    with pytest.raises(BrokenRule, match=r"aten.add.*nobody waited for"), StrictGroup(CPU):
        results.append(OPS.all_reduce(torch.ones(2), "sum", group))
        results[0] + 1
    with pytest.raises(BrokenRule, match="nobody waited for the result"), StrictGroup(CPU):
        results.append(OPS.all_reduce_(torch.ones(2), "sum", group))
    for result in results:
        OPS.wait_tensor(result)


# The ranks make different calls: in another shape, in another order, one more.
DISAGREE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from strict_group import BrokenRule, StrictGroup
import torch.distributed as dist
from llama import parallel
parallel.initialize(torch.device("cpu"))
rank = parallel.rank()
for calls in (
    [lambda: parallel.all_reduce(torch.ones(2 + rank))],
    [lambda: parallel.all_reduce(torch.ones(2)), lambda: parallel.all_gather(torch.ones(2, 2))],
    [lambda: rank or parallel.broadcast(torch.ones(2))],
):
    try:
        with StrictGroup(torch.device("cpu")):
            for call in reversed(calls) if rank else calls:
                call()
    except BrokenRule as error:
        assert "ranks make different calls" in str(error)
    else:
        raise AssertionError("a difference passed")
with StrictGroup(torch.device("cpu")) as strict:
    x = (torch.arange(12.0).view(3, 4) + rank)[:, : 2]  # strided
    assert torch.equal(parallel.all_gather(x), torch.cat((x - rank, x - rank + 1), dim=1))
    assert parallel.all_gather(x[:0]).shape == (0, 4)
    x = (torch.ones(3, 4, dtype=torch.bfloat16) + rank)[:, : 2]
    assert torch.equal(parallel.all_reduce(x), torch.full_like(x, 3))
    assert len(strict.calls) == 3
"""


@pytest.mark.slow
def test_ranks_that_disagree_are_told_and_ours_join_what_they_have(tmp_path: Path) -> None:
    done = torchrun("--nproc_per_node", "2", script(tmp_path, DISAGREE), HERE)
    assert done.returncode == 0, done.stderr[-3000:]


# Each rank generates under the rules, and writes its tokens and the kinds of its calls.
GENERATE = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[1])
from strict_group import StrictGroup
from llama import Llama
found = {}
for name, path, dtype, how in json.loads(sys.argv[3]):
    llama = Llama.build(path, device="cpu", dtype=getattr(torch, dtype), max_seq_len=128, **how)
    with StrictGroup(torch.device("cpu")) as strict:
        tokens = llama.generate([[1, 20, 300], [1, *range(40, 80)], [1]], 8, temperature=0)[0]
    kinds = [call.split()[0].split(".")[1] for call in strict.calls]
    found[name] = {"tokens": tokens, **{kind: kinds.count(kind) for kind in set(kinds)}}
with open(sys.argv[2] + os.environ.get("RANK", "0"), "w") as file:
    json.dump(found, file)
"""
# 769 pieces are uneven for any number of ranks, and for the operators of int4.
CASES = {
    "float32": ("float32", {"n_kv_heads": 4}, {}),
    "bfloat16": ("bfloat16", {"n_kv_heads": 4}, {}),
    "mqa": ("float32", {"n_kv_heads": 1}, {}),
    "odd_vocab": ("float32", {"vocab_size": 769}, {}),
    "int8": ("float32", {"vocab_size": 769}, {"quantize": "int8"}),
    "int4": ("bfloat16", {"vocab_size": 769}, {"quantize": "int4", "group_size": 32}),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    folder, cases = tmp_path_factory.mktemp("checkpoints"), []
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    for name, (dtype, params, how) in CASES.items():
        model = make_model(**{"dim": 256, "multiple_of": 256, "vocab_size": 768, **params})
        save([model.state_dict()], model.params, folder / name)
        cases.append((name, str(folder / name), dtype, how))
    return cases


@pytest.fixture(scope="module")
def generate(cases, tmp_path_factory: pytest.TempPathFactory):
    """Runs the cases on some ranks, once, and returns what each rank found."""
    runs: dict[int, list[dict]] = {}

    def run(n: int) -> list[dict]:
        if n not in runs:
            folder = tmp_path_factory.mktemp("run")
            program = (script(folder, GENERATE), HERE, str(folder / "rank"), json.dumps(cases))
            done = torchrun("--nproc_per_node", str(n), *program) if n > 1 else python(*program)
            assert done.returncode == 0, done.stderr[-3000:]
            runs[n] = [json.loads((folder / f"rank{i}").read_text()) for i in range(n)]
        return runs[n]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_networks_of_all_kinds_keep_nccls_rules(n: int, generate) -> None:
    """A failure is an error, a hang or wrong text on several GPUs."""
    ranks = generate(n)
    assert all(rank == ranks[0] for rank in ranks)
    for name, found in ranks[0].items():
        counts = {kind: number for kind, number in found.items() if kind != "tokens"}
        n_passes = 8  # the prompts' and 7 of single tokens; each ends with one device broadcast
        expected = {"all_reduce_": 2 * 2, "all_gather_into_tensor_out": 2, "broadcast_": 1}
        expected = {kind: number * n_passes for kind, number in expected.items()}
        assert counts == (expected if n > 1 else {}), name
        if CASES[name][0] == "float32" and name != "int8":  # others round differently
            assert found["tokens"] == generate(1)[0][name]["tokens"], name


# Rank 0 of 4 and of 8 with the kernels of a GPU: shapes and strides, no data.
FAKE = """
import contextlib, io, sys, torch
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import torch.distributed._functional_collectives  # which has the shapes of their results
from fairscale.nn.model_parallel import initialize as fairscale
from torch.testing._internal.distributed.fake_pg import FakeStore
from llama import ModelArgs, Transformer
from llama.checkpoint.rounding import make_scheme
from llama.layers.capability import Capability
from strict_group import StrictGroup
META = torch.device("meta")
Capability.of = lambda device: Capability("cuda", (9, 0), (torch.bfloat16,))
torch.Tensor.fake_device = property(lambda tensor: tensor.device)  # int4's operator asks for it
torch.set_default_dtype(torch.bfloat16)

def check(args, scheme, ranks):
    with META:
        model = Transformer(args).requires_grad_(False)
    if scheme is not None:
        model.quantize(make_scheme(scheme).forms(args), torch.bfloat16)
    model.pack()
    layer = model.layers[0]
    for n_tokens in (1, 2, 300):
        with StrictGroup(META) as strict:
            x = model.tok_embeddings(torch.zeros(n_tokens, dtype=torch.long, device=META))
            assert x.shape == (n_tokens, args.dim)
            heads = x.new_empty(n_tokens, args.dim // ranks)
            assert layer.attention.wo(heads).shape == layer.feed_forward(x).shape == x.shape
            assert model.logits(x).shape == (n_tokens, 32016)
        kinds = [call.split(".")[1] for call in strict.calls]
        assert kinds[1:3] == ["all_reduce_"] * 2
        assert kinds[::3] == ["all_gather_into_tensor_out"] * 2

for ranks, shape in (
    (4, {"dim": 4096, "n_heads": 32, "multiple_of": 256}),  # 7B
    (8, {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 256}),  # 34B
    (8, {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096}),  # nearly 70B
):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale.initialize_model_parallel(ranks)
    for scheme in (None, "int8", "int4"):
        with torch.inference_mode():
            check(ModelArgs(n_layers=1, vocab_size=32016, **shape), scheme, ranks)
    fairscale.destroy_model_parallel()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_eight_gpus_get_contiguous_tensors_of_code_llamas_uneven_parts(tmp_path: Path) -> None:
    """Of 32,016 pieces a rank has 4,002 or 8,004, which int4's operator pads and then cuts."""
    done = python(script(tmp_path, FAKE), HERE)
    assert done.returncode == 0, done.stderr[-3000:]


# Compiles blocks and the output for a prompt's tokens and for one of each sequence. The backend is
# what Inductor begins with, and it keeps the graphs.
COMPILE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import make_model
from llama import parallel
from llama.layers.batch import Segment
from torch._dynamo import lookup_backend
graphs = []
def backend(graph, inputs):
    graphs.append(graph.graph)
    return lookup_backend("aot_eager")(graph, inputs)
def same(function, *inputs):
    graphs.clear()
    torch._dynamo.reset()
    expected = function(*inputs)
    found = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
def collectives(name):
    found = [node for node in graphs[0].nodes if str(node.target).split(".")[1:2] == [name]]
    for node in found:
        (wait,) = node.users  # nobody else reads it
        assert "wait_tensor" in str(wait.target) and wait.users
    return len(found)
CPU = torch.device("cpu")
batches = [[Segment(0, 0, 5), Segment(2, 0, 3)], [Segment(0, 5, 1), Segment(2, 3, 1)]]
model = make_model(n_layers=1, n_kv_heads=4).requires_grad_(False)
several = parallel.world_size() > 1
with torch.inference_mode():
    for segments in batches:
        batch = model.backend.layout(segments, CPU)
        x = torch.randn(len(batch.slots), 64, generator=torch.Generator().manual_seed(0))
        same(model.layers[0].forward, x, model.freqs_cis[batch.positions], batch)
        assert collectives("all_reduce") == 2 * several
        same(model.output.forward, x)
        assert collectives("all_gather_into_tensor") == several
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_compiler_gets_a_layer_and_the_output_in_one_graph(n: int, tmp_path: Path) -> None:
    """A break would cost a launch by Python at each collective; a lost wait, wrong text."""
    program = (script(tmp_path, COMPILE), HERE)
    done = torchrun("--nproc_per_node", str(n), *program) if n > 1 else python(*program)
    assert done.returncode == 0, done.stderr[-3000:]
