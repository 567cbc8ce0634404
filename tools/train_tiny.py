"""Make the embedded checkpoint ``llama/tiny`` from scratch: text, tokenizer, weights, figures.

    python tools/train_tiny.py train       # tokenizer and weights: 36 minutes on one core
    python tools/train_tiny.py evaluate    # the figures of MODEL_CARD.md
    python tools/train_tiny.py code OUT_DIR    # another model, for benchmarks: train_code.py

The text is composed by ``tiny_world.py``; its held-out combinations never appear in training.
"""

import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer
from tiny_world import TASKS, Sample, compose, compose_task
from torch import nn
from tqdm import tqdm

from llama import Llama, ModelArgs, Tokenizer, Transformer, cli
from llama.chat.prompts import B_INST, E_INST, dialog_prompt_tokens, infilling_prompt_tokens
from llama.parallel import initialize
from llama.rope import rope_freqs

OUT_DIR = Path(__file__).resolve().parent.parent / "llama" / "tiny"
PARAMS = {
    "dim": 192,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 768,
    "multiple_of": 64,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
MAX_SEQ_LEN = 512
IGNORED = -100  # a target without loss
# Most next words of a story are a free choice: texts with one correct answer get more weight.
WEIGHT = {"story": 0.2, "code": 1.0, "dialog": 1.0, "infill": 1.0}


def train_bpe(sentences: Iterator[str], vocab_size: int, **options: Any) -> bytes:
    """Train a byte-fallback BPE model that round-trips every text.

    Args:
        sentences: the text to learn pieces from.
        options: further options of SentencePiece.

    Returns:
        The contents of a ``tokenizer.model``.
    """
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def train_tokenizer(path: Path, rng: random.Random) -> None:
    """Train a tokenizer with Code Llama's infilling pieces as control symbols."""

    def lines() -> Iterator[str]:
        for _ in range(20_000):
            sample = compose(rng)
            turns = "\n".join(f"{B_INST} {m['content']} {E_INST}" for m in sample.messages)
            for text in (sample.text, turns, sample.prefix, sample.middle, sample.suffix):
                yield from text.splitlines()

    controls = ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]
    vocab_size = int(PARAMS["vocab_size"])
    path.write_bytes(
        train_bpe(lines(), vocab_size, character_coverage=1.0, control_symbols=controls)
    )


def encode(
    tokenizer: Tokenizer, sample: Sample, suffix_first: bool = False
) -> tuple[list[int], list[int]]:
    """Return token ids and targets: the next token of each position, or IGNORED."""
    if sample.kind == "dialog":
        return encode_dialog(tokenizer, sample)
    if sample.kind == "infill":
        assert tokenizer.eot_id is not None
        ids = infilling_prompt_tokens(tokenizer, sample.prefix, sample.suffix, suffix_first)
        ids = [*ids, *tokenizer.encode_infilling(sample.middle), tokenizer.eot_id]
    else:
        ids = tokenizer.encode(sample.text, bos=True, eos=True)
    return ids[:-1], ids[1:]


def encode_dialog(tokenizer: Tokenizer, sample: Sample) -> tuple[list[int], list[int]]:
    """Encode a dialog, whose targets are the assistant's words and a final end of sequence."""
    dialog = list(sample.messages)
    answers = [i for i, message in enumerate(dialog) if message["role"] == "assistant"]
    ids: list[int] = []
    targets: list[int] = []
    for i in answers:
        prompt = dialog_prompt_tokens(tokenizer, dialog[:i])
        answer = tokenizer.encode(dialog[i]["content"], bos=False, eos=i == answers[-1])
        ids = prompt + answer
        n_targets = len(targets)
        targets += [IGNORED] * (len(prompt) - 1 - n_targets) + answer
    return ids[:-1], targets


def join_dialogs(samples: list[Sample]) -> Sample:
    """Join dialogs to a long one: earlier turns must not affect the next answer."""
    messages = [m for sample in samples for m in sample.messages]
    later = [m for m in messages[1:] if m["role"] != "system"]
    return Sample("dialog", "joined", messages=(messages[0], *later))


def batches(tokenizer: Tokenizer, rng: random.Random, tokens: int) -> Iterator[list[torch.Tensor]]:
    """Yield [ids, targets, weights] of about ``tokens`` tokens, of samples of similar length."""
    while True:
        encoded = []
        while len(encoded) < 1024:
            sample = compose(rng)
            if sample.kind == "dialog" and rng.random() < 0.15:
                # A system message applies to the whole dialog: only dialogs without one are joined.
                more = [compose(rng) for _ in range(rng.randint(2, 10))]
                plain = [
                    s
                    for s in (sample, *more)
                    if s.kind == "dialog" and s.messages[0]["role"] != "system"
                ]
                sample = join_dialogs(plain) if plain else sample
            ids, targets = encode(tokenizer, sample, suffix_first=rng.random() < 0.5)
            if len(ids) <= MAX_SEQ_LEN:
                encoded.append((ids, targets, WEIGHT[sample.kind]))
        encoded.sort(key=lambda sample: len(sample[0]))
        groups, group = [], []
        for item in encoded:
            if len(item[0]) * (len(group) + 1) > tokens:
                groups.append(group)
                group = []
            group.append(item)
        groups.append(group)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _, _ in group)
            yield [
                torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in group]),
                torch.tensor([t + [IGNORED] * (width - len(t)) for _, t, _ in group]),
                torch.tensor([[weight] * width for _, _, weight in group]),
            ]


def rotate_pairs(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Multiply pairs by complex numbers: ``apply_rotary_emb`` has no gradient."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def training_logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Return logits without the cache, for gradients: (bsz, seqlen) to (bsz * seqlen, vocab)."""
    bsz, seqlen = ids.shape
    head_dim = model.params.head_dim
    angles = torch.outer(torch.arange(seqlen).repeat(bsz), rope_freqs(model.params))
    rotation = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    future = torch.full((seqlen, seqlen), float("-inf")).triu(1)
    h = model.tok_embeddings(ids.flatten())
    for layer in model.layers:
        attention = layer.attention
        x = layer.attention_norm(h)
        xq = rotate_pairs(attention.wq(x).unflatten(-1, (-1, head_dim)), rotation)
        xk = rotate_pairs(attention.wk(x).unflatten(-1, (-1, head_dim)), rotation)
        xv = attention.wv(x).unflatten(-1, (-1, head_dim))
        n_rep = xq.shape[1] // xk.shape[1]
        xk, xv = xk.repeat_interleave(n_rep, 1), xv.repeat_interleave(n_rep, 1)
        xq, xk, xv = (t.unflatten(0, (bsz, seqlen)).transpose(1, 2) for t in (xq, xk, xv))
        # Not fused: at this head size the fused kernel's backward pass is four times slower.
        scores = (xq @ xk.transpose(2, 3)) * head_dim**-0.5 + future.to(xq.dtype)
        out = scores.softmax(-1).to(xv.dtype) @ xv
        h = h + attention.wo(out.transpose(1, 2).flatten(2).flatten(0, 1))
        h = h + layer.feed_forward(layer.ffn_norm(h))
    return model.output(model.norm(h))


def initialize_weights(model: Transformer) -> None:
    into_residual = ("wo.weight", "w2.weight")  # smaller, so that the residual sum keeps its scale
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = (2 * model.params.n_layers) ** -0.5 if name.endswith(into_residual) else 1.0
            nn.init.normal_(parameter, std=0.05 * scale)


def make_optimizer(model: Transformer) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )


def descend(
    model: Transformer, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float
) -> None:
    """Take an optimizer step at a learning rate of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def schedule(step: int, steps: int) -> float:
    """Return the learning rate's factor: up from 0, constant, in the second half down to 0."""
    return min(1.0, (step + 1) / 200, 2 * (1 - step / steps))


def train(steps: int = 7000, seed: int = 1, batch_tokens: int = 4096, lr: float = 3e-3) -> None:
    """Train from scratch and write ``llama/tiny``."""
    torch.manual_seed(seed)
    initialize(torch.device("cpu"))
    OUT_DIR.mkdir(exist_ok=True)
    train_tokenizer(OUT_DIR / "tokenizer.model", random.Random(f"tokenizer {seed}"))
    tokenizer = Tokenizer(OUT_DIR / "tokenizer.model")
    (OUT_DIR / "params.json").write_text(json.dumps(PARAMS) + "\n")
    model = Transformer(ModelArgs(**PARAMS, max_batch_size=1, max_seq_len=MAX_SEQ_LEN))
    initialize_weights(model)
    optimizer = make_optimizer(model)
    forward = torch.compile(training_logits, dynamic=True)
    stream = batches(tokenizer, random.Random(f"train {seed}"), batch_tokens)
    progress = tqdm(range(steps), unit="step")
    mean_loss = math.log(tokenizer.n_words)
    for step in progress:
        ids, targets, weights = next(stream)
        targets, weights = targets.flatten(), weights.flatten()
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(model, ids)
        losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
        loss = (losses * weights).sum() / weights[targets != IGNORED].sum()
        descend(model, optimizer, loss, lr * schedule(step, steps))
        mean_loss += 0.02 * (loss.item() - mean_loss)
        progress.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            tensors = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
            torch.save(tensors, OUT_DIR / "consolidated.00.pth")


def answer(llama: Llama, samples: list[Sample], suffix_first: bool) -> list[str]:
    """Return the model's greedy middles or last answers."""
    if samples[0].kind == "infill":
        prefixes, suffixes = [s.prefix for s in samples], [s.suffix for s in samples]
        middles = llama.text_infilling(prefixes, suffixes, 0, suffix_first=suffix_first)
        return [middle["generation"] for middle in middles]
    dialogs = [list(s.messages[:-1]) for s in samples]
    return [r["generation"]["content"] for r in llama.chat_completion(dialogs, 0)]


def perplexity(llama: Llama, samples: list[Sample], suffix_first: bool = False) -> float:
    """Return the perplexity of the tokens that have a loss in training."""
    total, count = 0.0, 0
    for sample in samples:
        ids, targets = encode(llama.tokenizer, sample, suffix_first)
        logits = llama.model(torch.tensor([ids]), 0)[0]
        loss = F.cross_entropy(logits, torch.tensor(targets), ignore_index=IGNORED, reduction="sum")
        total += loss.item()
        count += sum(t != IGNORED for t in targets)
    return math.exp(total / count)


def evaluate(samples: int = 300, seed: int = 2) -> None:
    """Measure ``llama/tiny`` on held-out combinations: perplexities and exact matches."""
    llama = Llama.build(max_seq_len=MAX_SEQ_LEN, max_batch_size=32)
    rng = random.Random(f"evaluate {seed}")
    samples_of = {t: [compose_task(t, rng, heldout=True) for _ in range(samples)] for t in TASKS}
    print(f"{'held-out task':<24}{'perplexity':>12}{'exact match':>13}")
    for task, some in samples_of.items():
        orders = (False, True) if task == "infill" else (False,)
        for suffix_first in orders:
            label = f"{task} (suffix first)" if suffix_first else task
            line = f"{label:<24}{perplexity(llama, some, suffix_first):>12.3f}"
            if task not in ("story", "tell", "code"):  # these have no single correct answer
                expected = [s.middle or s.messages[-1]["content"] for s in some]
                answers = answer(llama, some, suffix_first)
                n_correct = sum(a == b for a, b in zip(answers, expected, strict=True))
                line += f"{100 * n_correct / samples:>11.1f} %"
            print(line)
    everything = [sample for some in samples_of.values() for sample in some]
    print(f"{'all':<24}{perplexity(llama, everything):>12.3f}")


if __name__ == "__main__":
    from train_code import train_code  # which imports this module

    cli.run_command({"train": train, "evaluate": evaluate, "code": train_code})
