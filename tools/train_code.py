"""Train a Llama of 16 million weights on the source code of Python's own standard library.

    python tools/train_tiny.py code OUT_DIR    # half an hour

Every machine has this text. As it isn't synthetic, the model's weights resemble those of larger
ones: benchmarks measure with it how much quantisation costs. Held-out files are written to the same
directory for ``python -m llama.perplexity OUT_DIR OUT_DIR/heldout.txt``.
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

SHAPE = {"dim": 384, "n_layers": 8, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 128}
ARGS = ModelArgs(**SHAPE, vocab_size=4096, max_batch_size=1, max_seq_len=MAX_SEQ_LEN)
# Tests would be most of the text; encodings, pydoc_data and _sysconfigdata (which differs between
# machines) are tables.
EXCLUDED = ("site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
HELD_OUT = 200_000  # characters; a token has 3 to 4
LARGEST_HELD_OUT = 20_000  # so that no single file dominates


def library_texts() -> list[str]:
    """Return the standard library's source files, in the order of their paths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(library.rglob("*.py")):
        is_excluded = not {*EXCLUDED}.isdisjoint(path.relative_to(library).parts)
        if not is_excluded and not path.name.startswith("_sysconfigdata"):
            with tokenize.open(path) as file:  # in the encoding that the file declares
                texts.append(file.read())
    return [text for text in texts if text]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return files to train on and files to hold out, independent of the training's seed."""
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
    """Yield windows of MAX_SEQ_LEN + 1 tokens without end; each epoch shuffles the files."""
    while True:
        joined = [i for ids in rng.sample(files, len(files)) for i in ids]
        chunks = list(torch.tensor(joined).unfold(0, MAX_SEQ_LEN + 1, MAX_SEQ_LEN))
        rng.shuffle(chunks)
        yield from chunks


def training_loss(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    logits = training_logits(model, tokens[:, :-1])
    return F.cross_entropy(logits.float(), tokens[:, 1:].flatten())


def train_code(
    out_dir: str, steps: int = 4000, seed: int = 1, batch_size: int = 2, lr: float = 1.5e-3
) -> None:
    """Train on the standard library's source code, and print the held-out perplexity.

    Args:
        out_dir: the directory to write, with ``heldout.txt``; must not exist.
        steps: the number of batches.
        seed: of the weights and of the batches' order.
        batch_size: windows of 512 tokens in a batch.
        lr: the highest learning rate.

    Raises:
        FileExistsError: ``out_dir`` already exists.
    """
    out = Path(str(out_dir))
    if out.exists():
        raise FileExistsError(f"{out} already exists: give another name or remove it")
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
        tokens = torch.stack(list(islice(stream, batch_size)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled_loss(model, tokens)
        descend(model, optimizer, loss, lr * schedule(step, steps))
        mean_loss += 0.02 * (loss.item() - mean_loss)
        progress.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
    extra_files = {"tokenizer.model": pieces, "heldout.txt": "".join(heldout).encode()}
    save([model.state_dict()], ARGS, out, files=extra_files, dtype=torch.bfloat16)
    perplexity.main(str(out), str(out / "heldout.txt"))
