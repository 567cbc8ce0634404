"""Train a Llama of 16 million weights on the source code of Python's own standard library.

    python tools/train_tiny.py code OUT_DIR    # half an hour

Any machine has the text, and a model that predicts what nobody composed has weights like those of
larger ones: benchmarks measure on it what fewer bits cost. Files that it never saw are written
beside it, so that ``python -m llama.perplexity OUT_DIR OUT_DIR/heldout.txt`` tells how good it is.
"""

import math
import random
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from train_tiny import (
    MAX_SEQ_LEN,
    descend,
    initialize_weights,
    make_optimizer,
    schedule,
    train_bpe,
    training_logits,
)

from llama import ModelArgs, Tokenizer, Transformer, perplexity
from llama.checkpoint.save import save
from llama.parallel import initialize

ARGS = ModelArgs(
    dim=384,
    n_layers=8,
    n_heads=6,
    n_kv_heads=2,
    vocab_size=4096,
    multiple_of=128,  # a hidden_dim of 1024
    max_batch_size=1,
    max_seq_len=MAX_SEQ_LEN,
)
# Tests would be most of the text; encodings, pydoc_data and _sysconfigdata, whose name and contents
# differ from machine to machine, are tables.
LEFT_OUT = ("site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
HELD_OUT = 200_000  # characters, of 3 to 4 a token
LARGEST_HELD_OUT = 20_000  # so that no one file decides


def library_texts() -> list[str]:
    """The standard library's source files, in the order of their paths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(library.rglob("*.py")):
        left_out = not {*LEFT_OUT}.isdisjoint(path.relative_to(library).parts)
        if not left_out and not path.name.startswith("_sysconfigdata"):
            with tokenize.open(path) as file:  # as its coding line says
                texts.append(file.read())
    return [text for text in texts if text]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Files to train on, and files to hold out: the same whatever the training's seed."""
    training, heldout = [], []
    size = 0
    for text in random.Random("held out").sample(texts, len(texts)):
        if size < HELD_OUT and len(text) <= LARGEST_HELD_OUT:
            heldout.append(text)
            size += len(text)
        else:
            training.append(text)
    return training, heldout


def windows(files: list[list[int]], rng: random.Random) -> Iterator[torch.Tensor]:
    """Endless windows of MAX_SEQ_LEN + 1 tokens; each time through, files are joined anew."""
    while True:
        joined = [i for ids in rng.sample(files, len(files)) for i in ids]
        rows = list(torch.tensor(joined).unfold(0, MAX_SEQ_LEN + 1, MAX_SEQ_LEN))
        rng.shuffle(rows)
        yield from rows


def training_loss(model: Transformer, rows: torch.Tensor) -> torch.Tensor:
    logits = training_logits(model, rows[:, :-1])
    return F.cross_entropy(logits.float(), rows[:, 1:].flatten())


def train_code(
    out_dir: str, steps: int = 4000, seed: int = 1, batch_size: int = 2, lr: float = 1.5e-3
) -> None:
    """Train on the standard library's source code, and print the held-out perplexity.

    Args:
        out_dir: where to write the checkpoint, with ``heldout.txt``; must not exist.
        steps: how many batches to train on.
        seed: of the weights and of the batches' order.
        batch_size: windows of 512 tokens in a batch.
        lr: the learning rate at its highest.

    Raises:
        FileExistsError: ``out_dir`` is there already.
    """
    out = Path(str(out_dir))
    if out.exists():
        raise FileExistsError(f"{out} is there already: give another name or remove it")
    torch.manual_seed(seed)
    initialize(torch.device("cpu"))
    texts, heldout = split(library_texts())
    longest = max(len(text.encode()) for text in texts)
    pieces = train_bpe(
        iter(texts), ARGS.vocab_size, character_coverage=0.9999, max_sentence_length=longest
    )
    tokenizer = Tokenizer("tokenizer.model", pieces)
    files = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    stream = windows(files, random.Random(f"code {seed}"))
    model = Transformer(ARGS)
    initialize_weights(model)
    optimizer = make_optimizer(model)
    compiled_loss = torch.compile(training_loss)
    progress = tqdm(range(steps), unit="step")
    mean_loss = math.log(tokenizer.n_words)
    for step in progress:
        rows = torch.stack(list(islice(stream, batch_size)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled_loss(model, rows)
        descend(model, optimizer, loss, lr * schedule(step, steps))
        mean_loss += 0.02 * (loss.item() - mean_loss)
        progress.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
    beside = {"tokenizer.model": pieces, "heldout.txt": "".join(heldout).encode()}
    save([model.state_dict()], ARGS, out, files=beside, dtype=torch.bfloat16)
    perplexity.main(str(out), str(out / "heldout.txt"))
