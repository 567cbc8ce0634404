"""Many concurrent requests of all kinds, some cancelled, some malformed: no errors, no leaks.

    python benchmarks/soak.py                    # for an hour, to a server of the embedded model
    python benchmarks/soak.py --seconds 10

The answers, also sampled ones, are compared with those of ``Llama``'s own calls in float32, and so
are vectors. At the end all slots must be free, and the server's resident memory about the same as
after a quarter of the time.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from llama import Llama, cli

ALLOWED_GROWTH = 32e6  # bytes that Python and the allocator may keep
MAX_SEQ_LEN = 256


class Case(NamedTuple):
    """A request, and the expected texts or vectors."""

    path: str
    body: dict[str, Any]
    texts: list[str]
    vectors: torch.Tensor | None = None  # shape (n, dim), of length 1


def make_cases(llama: Llama, rng: random.Random, n: int = 60) -> list[Case]:
    """Return requests of all kinds, with the answers of ``llama`` to each alone."""
    animals = ["cow", "duck", "bee", "dog", "cat", "horse"]
    cases = []
    for i in range(n):
        settings = {"temperature": rng.choice([0.0, 0.7, 1.1]), "top_p": 0.9, "seed": i}
        limit = rng.choice([4, 12, 40])
        body: dict[str, Any] = {**settings, "max_tokens": limit, "stream": rng.random() < 0.6}
        settings["max_gen_len"] = limit
        kind = i % 4
        if rng.random() < 0.2:
            body["cache_salt"] = rng.choice(["a", "b"])
        if kind == 3:
            texts = [f"The {rng.choice(animals)} number {j}" for j in range(rng.choice([1, 3, 90]))]
            vectors = torch.nn.functional.normalize(llama.embed(texts))
            cases.append(Case("/v1/embeddings", {"input": texts, "stream": False}, [], vectors))
            continue
        if kind == 0:
            system = [{"role": "system", "content": "You are a pirate."}] * (i % 2)
            question = f"What does the {rng.choice(animals)} {rng.choice(['say', 'eat'])}?"
            dialog = [*system, {"role": "user", "content": question}]
            results = llama.chat_completion([dialog], **settings)
            texts = [results[0]["generation"]["content"]]
            body["messages"] = dialog
        elif kind == 1:
            n_answers = rng.choice([1, 1, 3, 12])
            prompt = f"The {rng.choice(animals)} and the {rng.choice(animals)} " * rng.choice(
                [1, 9]
            )
            stop = rng.choice([[], ["."], ["the", " a "]])
            prompts = [prompt] * n_answers
            results = llama.text_completion(prompts, stop=stop, echo=True, **settings)
            texts = [prediction["generation"] for prediction in results]
            body |= {"prompt": prompt, "n": n_answers, "stop": stop, "echo": True}
        else:
            prefix, suffix = f"def f{i}(a, b):\n    return ", "\n"
            results = llama.text_infilling([prefix], [suffix], **settings)
            texts = [results[0]["generation"]]
            body |= {"prompt": prefix, "suffix": suffix}
        path = "/v1/chat/completions" if kind == 0 else "/v1/completions"
        cases.append(Case(path, body, texts))
    return cases


MALFORMED: list[tuple[str, bytes]] = [
    ("/v1/completions", b"{"),
    ("/v1/completions", b'{"prompt": [99999]}'),
    ("/v1/completions", b'{"prompt": "a", "temperature": -1}'),
    ("/v1/completions", b'{"prompt": "a", "what": 1}'),
    ("/v1/completions", json.dumps({"prompt": "word " * 500}).encode()),
    ("/v1/chat/completions", b'{"messages": [{"role": "tool", "content": ""}]}'),
    ("/v1/chat/completions", b"[" * 3000),
    ("/v1/embeddings", b'{"input": {}}'),
]


async def check_vectors(client: httpx.AsyncClient, case: Case) -> None:
    """Send a request for vectors; raise AssertionError for wrong ones."""
    answer = await client.post(case.path, json={"input": case.body["input"]})
    answer.raise_for_status()
    found = torch.tensor([each["embedding"] for each in answer.json()["data"]])
    assert case.vectors is not None
    assert torch.allclose(found, case.vectors, atol=1e-4), f"{case.body}: wrong vectors"


async def check_texts(client: httpx.AsyncClient, case: Case) -> None:
    """Send a request for texts; raise AssertionError for wrong ones."""
    texts = await ask(client, case)
    assert texts == case.texts, f"{case.body}: {texts} instead of {case.texts}"


async def ask(client: httpx.AsyncClient, case: Case) -> list[str]:
    """Send a request, and return the texts of its answer."""
    texts = [""] * len(case.texts)
    if not case.body["stream"]:
        answer = await client.post(case.path, json=case.body)
        answer.raise_for_status()
        for choice in answer.json()["choices"]:
            texts[choice["index"]] = text_of(choice)
        return texts
    async with client.stream("POST", case.path, json=case.body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts[choice["index"]] += text_of(choice)
    return texts


def text_of(choice: dict[str, Any]) -> str:
    content = choice.get("message") or choice.get("delta") or choice
    return content.get("content") or content.get("text") or ""


async def cancel(client: httpx.AsyncClient, case: Case, rng: random.Random) -> None:
    """Disconnect before the answer or in the middle of it."""
    body = {**case.body, "max_tokens": 200, "temperature": 1.5}
    if case.vectors is not None:
        body = {"input": case.body["input"]}
    with contextlib.suppress(httpx.TimeoutException):
        if case.vectors is not None or rng.random() < 0.5:
            await client.post(case.path, json=body, timeout=rng.random() * 0.2)
            return
        stream = {**body, "stream": True}
        async with client.stream("POST", case.path, json=stream, timeout=5) as answer:
            n_lines = rng.randrange(6)
            async for _ in answer.aiter_lines():
                n_lines -= 1
                if n_lines < 0:
                    return


def resident(pid: int) -> int:
    """Return a process's resident memory in bytes (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def soak(url: str, pid: int, cases: list[Case], seconds: float, at_once: int) -> Counter[str]:
    """Send requests, and return how they ended; raise AssertionError for a wrong answer."""
    rng = random.Random(2)
    ends: Counter[str] = Counter()
    show = cli.progress(round(seconds), "asking", "seconds")
    begin = time.monotonic()
    first_quarter = 0

    async def worker(client: httpx.AsyncClient) -> None:
        nonlocal first_quarter
        while (passed := time.monotonic() - begin) < seconds:
            case = rng.choice(cases)
            chance = rng.random()
            if chance < 0.05:
                await cancel(client, case, rng)
                ends["cancelled"] += 1
            elif chance < 0.1:
                path, content = rng.choice(MALFORMED)
                headers = {"Content-Type": "application/json"}
                answer = await client.post(path, content=content, headers=headers)
                assert answer.status_code == 400, (content[:50], answer.status_code, answer.text)
                ends["malformed"] += 1
            else:
                check = check_texts if case.vectors is None else check_vectors
                await check(client, case)
                ends["correct"] += 1
            if not first_quarter and passed > seconds / 4:
                first_quarter = resident(pid)
            show(min(round(passed), round(seconds)))

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(worker(client) for _ in range(at_once)))
        for _ in range(500):
            health = (await client.get("/health")).json()
            if not health["active"] and not health["waiting"]:
                break
            await asyncio.sleep(0.01)
        assert not health["active"] and not health["waiting"], f"slots are still in use: {health}"
    growth = resident(pid) - first_quarter
    print(
        f"resident memory: {first_quarter / 1e6:.0f} MB after a quarter of the time, "
        f"{growth / 1e6:+.1f} MB at the end"
    )
    assert growth < ALLOWED_GROWTH, "the server's memory grows"
    return ends


def main(seconds: float = 3600, at_once: int = 24) -> None:
    """Start a server of the embedded model, and send it requests.

    Args:
        seconds: how long.
        at_once: concurrent requests; by default three times the number of slots.
    """
    llama = Llama.build(max_seq_len=MAX_SEQ_LEN, dtype=torch.float32, device="cpu")
    cases = make_cases(llama, random.Random(1))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "llama.server", "--dtype", "float32", "--device", "cpu"]
    command += ["--port", str(port), "--page=False", "--max_seq_len", str(MAX_SEQ_LEN)]
    command += ["--max_queue", str(16 * at_once)]  # so that no request finds it full
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").is_success:
                    break
            assert server.poll() is None, "the server didn't start"
            time.sleep(0.1)
        ends = asyncio.run(soak(url, server.pid, cases, seconds, at_once))
        summary = ", ".join(f"{count:,} {end}" for end, count in sorted(ends.items()))
        print(f"{sum(ends.values()):,} requests in {seconds:.0f} s: {summary}; all slots are free")
    finally:
        server.terminate()
        status = server.wait(30)
    assert status == 0, f"the server ended with status {status}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cli.run(main)
