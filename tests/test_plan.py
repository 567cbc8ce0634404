"""Plans for machines: sizes are loading's own, and speeds those that the documentation measured."""

import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from llama import Llama, ModelArgs
from llama.checkpoint.base import Weights
from llama.checkpoint.memory import Network
from llama.checkpoint.rounding import make_scheme
from llama.checkpoint.sharding import parameter_count
from llama.cli import run
from llama.generation import TINY
from llama.layers.quantization import Grouped
from llama.plan import divisions, needs_of
from llama.plan.costs import (
    DEVICES,
    Device,
    Machines,
    Pass,
    cost,
    position_bytes,
    prompt_cost,
    read_bytes,
)
from llama.plan.flags import WorkFlags
from llama.plan.networks import SIZES, open_network

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from gpu_engines import FILES
from shapes import SHAPES, network_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
WEIGHTS = {"int8": "int8", "int4": "int4", "Q4_K_M": Grouped("int4", 32), **FILES}
H200 = Machines(DEVICES["h200"])
A100 = Machines(DEVICES["a100"], gpus=8)
GPU_FACTOR, GPT_FAST_FACTOR, CPU_FACTOR = 1.25, 1.15, 1.5  # docs/scaling.md tells them


def sized(size: str) -> ModelArgs:
    return ModelArgs(**SIZES[size])


class Measured(NamedTuple):
    """A row of the documentation's tables: tokens per second."""

    engine: str
    bsz: int
    context: int
    prefill: float
    decode: float

    def network(self, shape: str) -> Network:
        kinds = (WEIGHTS[word] for word in self.engine.split() if word in WEIGHTS)
        return network_of(SHAPES[shape], next(kinds, "bf16"))


def gpu_rows() -> list[Measured]:
    row = r"^\| (llama[^|]*) \| (\d+) \| ([\d,]+) \| (\d+) \| [\d.]+ \| ([\d.]+) \|"
    found = re.findall(row, PAGES["gpu.md"], re.M)
    rows = ((n, int(b), int(c.replace(",", "")), float(p), float(d)) for n, b, c, p, d in found)
    return [Measured(*row) for row in rows]


@pytest.mark.parametrize("row", gpu_rows(), ids=lambda row: f"{row.engine} {row.bsz} {row.context}")
def test_measured_speeds_of_a_gpu_are_near_the_plans(row: Measured) -> None:
    """A failure means that plans for a GPU promise what this library doesn't do."""
    network = row.network("7B")
    compiled = "compiled" in row.engine
    step = cost(network, H200, 1, Pass.step(row.bsz, row.context), compiled)
    assert 1 / GPU_FACTOR < row.bsz / step.seconds / row.decode < GPU_FACTOR
    n_prompts = min(row.bsz, max(8192 // row.context, 1))  # of a pass
    if n_prompts == 1:
        seconds = prompt_cost(network, H200, 1, row.context, 8192, compiled).seconds
    else:
        one = Pass.piece(0, row.context)
        seconds = cost(network, H200, 1, Pass(*(n_prompts * n for n in one)), compiled).seconds
    assert 1 / GPU_FACTOR < n_prompts * row.context / seconds / row.prefill < GPU_FACTOR


def test_the_gpus_rows_are_found() -> None:
    """A failure means that the documentation's tables are compared with nothing."""
    assert len(gpu_rows()) == 25 and {row.bsz for row in gpu_rows()} == {1, 8, 64}
    assert sum(len(rows) for _, rows in cpu_tables()) == 12


@pytest.mark.parametrize(
    ("shape", "ranks", "speeds"),
    [("7B", 1, (104.9, 155.6, 196.8)), ("70B", 8, (62.5, 80.4, 90.8))],
)
def test_gpt_fasts_speeds_are_near_the_plans(
    shape: str, ranks: int, speeds: tuple[float, ...]
) -> None:
    """A failure means that another GPU, or eight of them, are planned far from what is known.

    Source: the README of https://github.com/meta-pytorch/gpt-fast, with A100s.
    """
    for weights, measured in zip(("bf16", "int8", "int4"), speeds, strict=True):
        step = cost(network_of(SHAPES[shape], weights), A100, ranks, Pass.step(1, 200), True)
        assert 1 / GPT_FAST_FACTOR < 1 / step.seconds / measured < GPT_FAST_FACTOR, weights


def test_sdpa_is_as_slow_as_it_was_measured() -> None:
    """A failure means that plans with an int8 cache hide what it costs."""
    [text] = re.findall(r"decoded ([\d., and]+) tokens/s after\n? *512, 4,096", PAGES["gpu.md"])
    network = dataclasses.replace(network_of(SHAPES["7B"]), int8_cache=True)
    speeds = [float(each) for each in re.findall(r"\d+\.\d+", text)]
    for context, measured in zip((512, 4096, 16384), speeds, strict=True):
        step = cost(network, H200, 1, Pass.step(1, context))
        assert 1 / 1.4 < 1 / step.seconds / measured < 1.4


def cpu_tables() -> Iterator[tuple[Machines, list[Measured]]]:
    """Each kind of processor on which 1.1B was measured, with this library's rows."""
    head = r"^1\.1B.*?read bandwidth ([\d.]+) GB/s, \w+ peak (\d+) Gflop/s\n((?:\n?^\|.*$)+)"
    row = r"^\| (llama(?: \w+)?) \| (\d+) \| [\d.]+ \| ([\d.]+) \|"
    for bandwidth, flops, table in re.findall(head, PAGES["performance.md"], re.M):
        device = Device("", 0.0, float(bandwidth) * 1e9, float(flops) * 1e9, kind="cpu")
        rows = [
            Measured(engine, 1, 64, float(prefill), float(decode))
            for engine, prefill, decode in re.findall(row, table, re.M)
        ]
        yield Machines(device), rows


def test_measured_speeds_of_processors_are_near_the_plans() -> None:
    """A failure means that plans for a laptop promise what this library doesn't do."""
    for machines, rows in cpu_tables():
        for row in rows:
            network = row.network("1.1B")
            step = cost(network, machines, 1, Pass.step(1, row.context))
            prompt = prompt_cost(network, machines, 1, 512, 512)
            found = (1 / step.seconds / row.decode, 512 / prompt.seconds / row.prefill)
            # Integers, which are multiplied faster than floats without AMX, aren't planned.
            has_amx, is_plain = machines.device.flops > 1e12, row.engine == "llama"
            least = 1 / CPU_FACTOR if has_amx or is_plain else 0.25
            assert all(least < each < CPU_FACTOR for each in found), (row, found)


@pytest.mark.parametrize(
    ("size", "n_parameters"),
    [
        ("7B", 6_738_415_616),
        ("13B", 13_015_864_320),
        ("34B", 33_743_970_304),
        ("70B", 68_976_648_192),
        ("1B", 1_235_814_400),
        ("3B", 3_212_749_824),
        ("8B", 8_030_261_248),
        ("405B", 405_853_388_800),
    ],
)
def test_published_sizes(size: str, n_parameters: int) -> None:
    """A failure means a plan for another network than the published one."""
    assert parameter_count(sized(size)) == n_parameters


@pytest.mark.parametrize("size", ["7B", "70B", "3B"])
@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_a_step_reads_all_weights_but_the_embedding(size: str, ranks: int) -> None:
    """A failure means that some weight is counted twice, or heads that ranks copy are forgotten."""
    args = sized(size)
    is_whole = args.tie_word_embeddings and ranks == 1  # the output is the embedding
    n_embedding = 0 if is_whole else args.vocab_size * args.dim // ranks
    weights = 2 * (parameter_count(args, ranks) - n_embedding)
    assert read_bytes(Network(args), ranks) == pytest.approx(weights)
    int4 = Network(args, forms=make_scheme("int4", 32).forms(args))
    assert read_bytes(int4, ranks) == pytest.approx(weights * 5 / 16, rel=0.01)


def test_sizes_are_those_of_a_loaded_network(tiny: Llama) -> None:
    """A failure means that what fits by the plan doesn't fit."""
    sizes = tiny.model.params
    work = WorkFlags(str(sizes.max_seq_len), dtype=torch.float32)
    network = open_network(str(TINY), "cpu", work)
    args = dataclasses.replace(network.args, max_batch_size=sizes.max_batch_size)
    assert args == sizes
    needs = needs_of(dataclasses.replace(network, args=args), DEVICES["cpu"], 1)
    assert needs.weights == sum(weight.nbytes for weight in tiny.model.parameters())
    position = position_bytes(network) * sizes.max_seq_len * sizes.max_batch_size
    caches = [layer.attention.cache for layer in tiny.model.layers]
    assert needs.cache == position == sum(cache.k.nbytes + cache.v.nbytes for cache in caches)


def test_machines_are_divided_into_copies() -> None:
    """A failure means that a division is left out, or its copies have all sequences each."""
    work = WorkFlags("16k", batch=64)
    network = open_network("70B", "cuda", work)
    found = divisions(network, Machines(DEVICES["h100"], 8, 2), work)
    shares = [(each.ranks, each.copies, each.network.args.max_batch_size) for each in found]
    assert shares == [(1, 16, 4), (2, 8, 8), (4, 4, 16), (8, 2, 32), (16, 1, 64)]
    assert [each.fits for each in found] == [False, False, True, True, True]
    assert [each.step.all_reduces > 0 for each in found] == [False, True, True, True, True]
    # Eight key/value heads: each of 16 ranks has one, as each of 8 has.
    assert found[4].needs.cache == 2 * found[3].needs.cache
    inside, across = found[3].step.all_reduces / 32, found[4].step.all_reduces / 64
    assert across > inside > 0
    six = divisions(network, Machines(DEVICES["h100"], 6), work)
    assert [each.ranks for each in six] == [1, 2]  # 64 heads aren't divided by 3 or 6


@pytest.mark.parametrize(
    ("limit", "size", "machines", "work"),
    [
        ("weights", "7B", H200, Pass.step(1, 100)),
        ("cache", "7B", H200, Pass.step(64, 4096)),
        ("arithmetic", "7B", H200, Pass.piece(0, 4096)),
        ("kernels", "1B", H200, Pass.step(1, 100)),
        ("all_reduces", "70B", Machines(DEVICES["h100"], 8, 2), Pass.step(1, 100)),
    ],
)
def test_the_largest_part_is_the_limit(
    limit: str, size: str, machines: Machines, work: Pass
) -> None:
    """A failure means that the plan blames the wrong part."""
    step = cost(Network(sized(size)), machines, machines.n_devices, work)
    assert (step.limit, step.seconds) == (limit, pytest.approx(sum(step)))


def test_pieces_of_a_prompt_add_up() -> None:
    """A failure means that a prompt in two passes attends to more, or less, than in one."""
    whole, first, second = Pass.piece(0, 300), Pass.piece(0, 100), Pass.piece(100, 200)
    assert whole.n_attended == 300 * 301 / 2 == first.n_attended + second.n_attended
    assert (second.n_tokens, second.n_outputs, second.n_filled) == (200, 1, 300)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def printed(*args: str) -> str:
        run("llama.plan:main", "llama.plan", args)
        return capsys.readouterr().out

    return printed


def test_the_command(plan: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that the command reads weights, or doesn't say what it is asked."""

    def read(self: Weights, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Weights, "__getitem__", read)
    text = plan(str(TINY), "--gpu", "cpu", "--bandwidth", "30", "--tflops", "1", "--memory", "8")
    assert "1,918,656 parameters in bfloat16\n1 x CPU: 8.4 GB, 30 GB/s, 1.0 Tflop/s" in text
    assert "| small kernels |" in text and "machine hours" in text
    text = plan("70B", "--gpus=8", "--gpu", "H100", "--context=16k", "--batch", "64", "--price=2")
    assert "sequences at a time: 64, of 16,384 tokens each" in text
    assert "| 2 | 4 | 68.98 GB | 42.95 GB |" in text and "| no |  |  | memory |" in text
    assert "fastest: a copy on 8 of 8" in text
    room = re.search(r"room for (\d+) sequences of 16,384 tokens, or for 64 of ([\d,]+)", text)
    assert room is not None and int(room[1]) > 64 and int(room[2].replace(",", "")) > 16384
    hours = re.search(r"a million new tokens: ([\d.]+) GPU hours, ([\d.]+) at 2.00", text)
    assert hours is not None and float(hours[2]) == pytest.approx(2 * float(hours[1]), abs=0.02)
    text = plan("70B", "--gpu", "rtx 4090")
    assert "nothing fits" in text
    assert re.search(r"- with --quantize int4, on 2 x RTX 4090: \d+ sequences of 4,096", text)


def test_the_documentation_shows_what_is_printed(plan: Callable[..., str]) -> None:
    """A failure means that docs/scaling.md plans other machines than the command."""
    pair = r"```bash\n(python -m llama\.plan [^\n]+)\n```\n\n```text\n(.*?)```"
    found = re.findall(pair, PAGES["scaling.md"], re.S)
    assert len(found) == 7
    for command, text in found:
        assert plan(*shlex.split(command)[3:]) == text, command


def test_what_has_room_fits(plan: Callable[..., str]) -> None:
    """A failure means that a plan which was followed ends with an error while building."""
    first = plan("8B", "--gpu", "l4", "--context", "8k", "--batch", "4", "--quantize", "int8")
    [most] = re.findall(r"room for \d+ sequences of 8,192 tokens, or for 4 of ([\d,]+)", first)
    longest = int(most.replace(",", ""))
    options = ("--gpu", "l4", "--batch", "4", "--quantize", "int8")
    assert "nothing fits" not in plan("8B", *options, "--context", str(longest))
    assert "nothing fits" in plan("8B", *options, "--context", str(longest * 5 // 4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "h1000"), "gpu is 'h1000': expected one of a100, h100,"),
        (("--gpu", "cpu", "--gpus", "2"), "the processes of one machine share its memory"),
        (("--context", "4m"), "context is '4m': give a number, such as 4096 or 4k"),
        (("--batch", "0"), "batch is 0"),
        (("--bandwidth", "-1"), "bandwidth is -1.0: expected a number above 0"),
        (("--quantize", "int3"), "quantize is 'int3'"),
        (("--kv_cache_dtype", "int4"), "kv_cache_dtype is 'int4'"),
        (("--group_size", "32"), "group_size is for quantize='int4'"),
    ],
)
def test_errors_say_what_to_change(
    plan: Callable[..., str], flags: tuple[str, ...], message: str
) -> None:
    """A failure means a traceback, or a plan for something that can't be built."""
    with pytest.raises(SystemExit, match=re.escape(message)):
        plan("7B", *flags)
