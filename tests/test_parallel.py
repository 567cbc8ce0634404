"""Devices, dtypes and processes: choices with fakes, everything else with real ranks on gloo."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import TIMED_OUT, forked, launcher, script, two_machines, wait_until

from llama import Llama, parallel
from llama.checkpoint.load import choose_dtype
from llama.checkpoint.save import reshard, save
from llama.checkpoint.sharding import parameter_count
from llama.generation import TINY

# What each rank does: build, generate, and write what it got.
GENERATE = """
import atexit, json, logging, os, sys, threading, torch
# The first to register is the last to run: by then a rank has parted from the others.
atexit.register(lambda: os.write(1, b"left" if not torch.distributed.is_initialized() else b"in"))
from datetime import timedelta
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from llama import Llama
rank = int(os.environ["RANK"])
out = {}
for directory in sys.argv[2:]:
    llama = Llama.build(directory, max_seq_len=1024, device="cpu", dtype=torch.float32)
    prompts = [[1, 20, 300], [1] + list(range(40, 80)), [1]]
    out[directory] = {
        "greedy": llama.generate(prompts, 40, temperature=0)[0],
        # Other seeds on other ranks: all must take the tokens that rank 0 drew.
        "sampled": llama.generate(prompts, 10, temperature=0.9, seed=rank)[0],
        "long": llama.generate([[1, 5, 9] * 300], 5, temperature=0)[0],
        "parameters": sum(p.numel() for p in llama.model.parameters()),
    }
# A rank may wait for the others' work as long as it takes.
group = get_model_parallel_group()._get_backend(torch.device("cpu"))
assert group.options._timeout > timedelta(days=30)
# Threads could bring calls to the ranks in different orders: a second one is refused.
def call():
    try:
        llama.generate([[1]], 1)
    except RuntimeError as error:
        out["thread"] = str(error)
thread = threading.Thread(target=call)
thread.start()
thread.join()
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump(out, file)
"""


@pytest.mark.parametrize(
    ("wanted", "cuda", "mps", "local_rank", "ranks", "expected"),
    [
        (None, True, False, 0, 1, "cuda:0"),
        (None, True, True, 3, 4, "cuda:3"),
        (None, False, True, 0, 1, "mps"),
        (None, False, True, 0, 2, "cpu"),
        (None, False, False, 1, 2, "cpu"),
        ("cpu", True, True, 0, 1, "cpu"),
        ("mps", True, True, 0, 1, "mps"),
        ("cuda", True, False, 2, 4, "cuda:2"),
        ("cuda:1", True, False, 0, 1, "cuda:1"),
        (torch.device("cuda"), True, False, 1, 2, "cuda:1"),
    ],
)
def test_choice_of_device(
    wanted: str | None, cuda: bool, mps: bool, local_rank: int, ranks: int, expected: str
) -> None:
    assert str(parallel.choose_device(wanted, cuda, mps, local_rank, ranks)) == expected


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("stored", "device", "fast_bf16", "expected"),
    [
        (F16, "cuda", True, BF16),
        (BF16, "cuda", True, BF16),
        (F16, "cuda", False, F16),
        (BF16, "mps", False, F16),
        (BF16, "cpu", True, BF16),
        (F16, "cpu", False, F32),
        (F32, "cpu", True, F32),
        (F32, "cuda", True, F32),
        (torch.float64, "cpu", True, F32),
    ],
)
def test_choice_of_dtype(
    stored: torch.dtype, device: str, fast_bf16: bool, expected: torch.dtype
) -> None:
    assert choose_dtype(stored, device, fast_bf16) == expected


@pytest.mark.slow
def test_one_process_needs_no_launcher_and_prints_nothing() -> None:
    """Nor does it wait for the import of PyTorch's compiler, which takes a second."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    code = """
import sys
from llama import Llama
Llama.build(device="cpu")
print(Llama.build(device="cpu").generate([[1, *range(9, 200)]], 2)[0] and "", end="")
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model in 1, 2 and 4 files, and random ones of difficult shapes."""
    from conftest import make_model

    directory = tmp_path_factory.mktemp("checkpoints")
    tokenizer = (TINY / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").write_bytes(tokenizer)
    paths = {"tiny1": TINY}
    for n in (2, 4):
        paths[f"tiny{n}"] = directory / f"tiny{n}"
        reshard(str(TINY), str(paths[f"tiny{n}"]), model_parallel_size=n)
    for name, params in {
        "mqa": {"n_kv_heads": 1, "vocab_size": 768, "attention_bias": True, "mlp_bias": True},
        "odd_vocab": {"n_kv_heads": 2, "vocab_size": 769},
    }.items():
        model = make_model(**params)
        paths[name] = directory / name
        save([model.state_dict()], model.params, paths[name])
    return paths


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What one process generates greedily."""
    found = {}
    for name, path in checkpoints.items():
        llama = Llama.build(path, max_seq_len=128, device="cpu", dtype=torch.float32)
        prompts = [[1, 20, 300], [1, *range(40, 80)], [1]]
        found[name] = llama.generate(prompts, 40, temperature=0)[0]
    return found


def test_shards_are_joined_in_one_process(alone: dict[str, list[list[int]]]) -> None:
    assert alone["tiny1"] == alone["tiny2"] == alone["tiny4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "names"),
    [(2, ["tiny1", "tiny2", "tiny4", "mqa", "odd_vocab"]), (4, ["tiny1", "tiny2"])],
)
def test_ranks_together_generate_what_one_does(
    n: int,
    names: list[str],
    checkpoints: dict[str, Path],
    alone: dict[str, list[list[int]]],
    tmp_path: Path,
) -> None:
    paths = [str(checkpoints[name]) for name in names]
    out = str(tmp_path / "rank")
    job = (script(tmp_path, GENERATE), out, *paths)
    done = forked(*job, n=n)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "left" * n  # else gloo's threads may abort the process
    ranks = [json.loads(Path(f"{out}{rank}").read_text()) for rank in range(n)]
    for name, path in zip(names, paths, strict=True):
        assert ranks[0][path]["greedy"] == alone[name]
        assert all(rank[path] == ranks[0][path] for rank in ranks)
    assert all("make all calls from one thread" in rank["thread"] for rank in ranks)
    args = {name: Llama.build(checkpoints[name], device="cpu").model.params for name in names}
    for name, path in zip(names, paths, strict=True):
        assert ranks[0][path]["parameters"] == parameter_count(args[name], n)


# Each rank writes what reached it of rank 0's messages; the others' own ones must not matter.
MESSAGES = """
import hashlib, json, os, sys, torch
from llama import parallel
from llama.server.workers import broadcast_bytes
parallel.initialize(torch.device("cpu"))
found = []
for size in json.loads(sys.argv[2]):
    message = bytes(i * 7 % 251 for i in range(size)) if parallel.rank() == 0 else b""
    found.append(hashlib.sha256(broadcast_bytes(message)).hexdigest())
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_messages_reach_every_rank_whole(tmp_path: Path) -> None:
    """A failure means that the ranks of a server take different requests, or wait for ever."""
    frame = 4096  # in which short messages go, with their length of 8 bytes
    sizes = [0, 1, *(frame + d for d in (-9, -8, -7, -1, 0, 1)), 1_000_000, 0, 3]
    out = tmp_path / "rank"
    done = forked(script(tmp_path, MESSAGES), str(out), json.dumps(sizes), n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [
        hashlib.sha256(bytes(i * 7 % 251 for i in range(size))).hexdigest() for size in sizes
    ]
    for rank in range(2):
        assert json.loads(Path(f"{out}{rank}").read_text()) == expected


def test_numbers_that_do_not_fit_are_refused_with_those_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"3 parts can't be made of 8 heads.* are 1, 2, 4, 8$"):
        Llama.build(device="cpu")


# Says that it has generated, by a file with its launcher's and its own process id.
UNTIL_KILLED = """
if torch.distributed.get_rank() > 0:
    logging.getLogger("llama.checkpoint").warning("rank 0 has said this")
with open(sys.argv[1] + os.environ["RANK"] + "pids", "w") as file:
    print(os.getppid(), os.getpid(), file=file, flush=True)
while True:
    llama.generate([[1, 20, 300]], 100, temperature=0)
"""


@pytest.mark.slow
def test_two_machines_of_which_one_is_lost(
    alone: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Two launchers, as on two machines: their ranks generate what one does, and where one of them
    is gone with its launcher, the other ends within 30 seconds and says which one."""
    out = str(tmp_path / "rank")
    code = (script(tmp_path, GENERATE + UNTIL_KILLED), out, str(TINY))
    files = [Path(f"{out}{rank}pids") for rank in range(2)]
    with two_machines(*code) as (first, second):
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
        pids = [[int(pid) for pid in file.read_text().split()] for file in files]
        victim = [launcher for launcher, _ in pids].index(second.pid)
        for pid in pids[victim]:
            os.kill(pid, signal.SIGKILL)
        assert first.wait(30) != 0
        assert f"RankLost: rank {victim} on {socket.gethostname()} has died" in first.output
        assert "rank 0 has said this" not in first.output + second.output
        with pytest.raises(ProcessLookupError):
            os.kill(pids[1 - victim][1], 0)
    for rank in range(2):
        found = json.loads(Path(f"{out}{rank}").read_text())
        assert found[str(TINY)]["greedy"] == alone["tiny1"]


# The second rank comes to harm while the first works or waits. A file with its process id says that
# one has generated.
FAULTY = """
import os, sys
from llama import Llama
from llama.checkpoint import meta
kind, out, rank = sys.argv[1], sys.argv[2], int(os.environ["RANK"])
harmed = rank == 1
if harmed and kind == "loading":
    def read(path):
        raise ValueError("damaged on this rank only")
    meta.open_shard = read
llama = Llama.build(device="cpu")
if harmed and kind == "memory":
    forward, calls = llama.model.hidden_states, iter(range(10**9))
    def harm(*arguments):
        if next(calls) == 20:
            raise MemoryError("out of memory on this rank only")
        return forward(*arguments)
    llama.model.hidden_states = harm
llama.generate([[1, 20, 300]], 5, temperature=0)
with open(out + str(rank), "w") as file:
    file.write(str(os.getpid()))
while True:
    llama.generate([[1, 20, 300]], 100, temperature=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("loading", "damaged on this rank only"),
        ("memory", "out of memory on this rank only"),
    ],
)
def test_a_rank_that_fails_ends(kind: str, message: str, tmp_path: Path) -> None:
    """A rank that waits for the others when it fails keeps the launcher from ending the job."""
    done = forked(script(tmp_path, FAULTY), kind, str(tmp_path / "pid"), n=2, timeout=45)
    assert done.returncode not in (0, TIMED_OUT)
    assert message in done.stderr


@pytest.mark.slow
def test_a_rank_killed_from_outside_ends_the_job_within_30_seconds(tmp_path: Path) -> None:
    out = tmp_path / "pid"
    faulty = (script(tmp_path, FAULTY), "none", str(out))
    files = [Path(f"{out}{rank}") for rank in range(2)]
    with launcher("--nproc_per_node", "2", *faulty) as job:
        wait_until(lambda: all(f.exists() and f.read_text() for f in files), 60)
        pids = [int(f.read_text()) for f in files]
        os.kill(pids[0], signal.SIGKILL)
        assert job.wait(30) != 0
        assert "SIGKILL" in job.output
        with pytest.raises(ProcessLookupError):
            os.kill(pids[1], 0)
