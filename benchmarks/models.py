"""The book's own small models: English prose after Jane Austen, and Tang poems.

Trains one model with chapter 15's loop, in a folder from which a killed run goes on; writes samples
at 1 %, 10 % and 100 % of the steps; and measures the test part beside Kneser–Ney on the same tokens.

    python benchmarks/models.py austen --data austen.txt.gz --out runs/austen
    python benchmarks/models.py tang --data tang.txt.gz --out runs/tang
    python benchmarks/models.py mini --data austen.txt.gz --out runs/mini

At the end the model goes into llm_book/models/ (eight bits a weight) and its scores into the ledger.

austen.txt.gz: the six novels (public domain), paragraphs separated by blank lines, each novel begins
with a line `=== title ===`. Of each novel the last 5 % of the paragraphs are the test part, the 5 %
before them validation. tang.txt.gz: poems in blocks separated by blank lines, a title, an author, the
lines. A poem's part follows from the SHA-256 of its text: 0 of 20 test, 1 of 20 validation.
"""
import argparse
import gzip
import hashlib
import importlib.resources
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import common
import numpy as np
import torch

from llm_book.decoder import load_int8, save_int8
from llm_book.generate import generate
from llm_book.gpt import GPT, GPTConfig
from llm_book.lab import progress, seed_everything
from llm_book.ngram import NGramLM
from llm_book.runs import RunFolder, describe, kept
from llm_book.tokens import BPETokenizer
from llm_book.train import Run, TrainConfig, steps

ONE_CHARACTER = r"(?s)."  # merges of a Chinese tokenizer build characters and stop there
PARTS = ("train", "validation", "test")
MODELS = Path(str(importlib.resources.files("llm_book"))) / "models"


@dataclass(frozen=True)
class Recipe:
    """How one of the models is made."""

    text: str  # which of the two
    vocab_size: int
    prompts: tuple[str, ...]  # of the samples
    shape: dict
    config: dict = field(default_factory=dict)
    counting_order: int = 5  # of the Kneser–Ney model beside it


COMMON = dict(positions="rotary", norm="rms", feed_forward="swiglu", bias="none", qk_norm=True)
STEPS = dict(optimizer="muon", muon_lr=0.02, max_lr=3e-3, min_lr=0.0, schedule="linear",
             precision="bfloat16", eval_windows=64)
RECIPES = {
    "austen": Recipe("novels", 2_048, ("She had ", "It was "),
                     dict(max_len=256, n_layers=4, d_model=224, n_heads=7, d_ff=600, dropout=0.1, **COMMON),
                     dict(max_steps=1_200, batch_size=16, seq_len=256, warmup_steps=50, eval_every=100,
                          checkpoint_every=25, **STEPS)),
    "mini": Recipe("novels", 1_024, ("She had ", "It was "),
                   dict(max_len=256, n_layers=3, d_model=112, n_heads=4, d_ff=304, **COMMON),
                   dict(max_steps=1_500, batch_size=8, seq_len=256, warmup_steps=50, eval_every=250,
                        checkpoint_every=50, **STEPS)),
    "tang": Recipe("poems", 6_000, ("春望\n", "送友人\n"),
                   dict(max_len=192, n_layers=4, d_model=192, n_heads=6, d_ff=512, dropout=0.1, **COMMON),
                   dict(max_steps=1_500, batch_size=16, seq_len=192, warmup_steps=50, eval_every=100,
                        checkpoint_every=25, **STEPS)),
}


def novels(text: str) -> dict[str, str]:
    """The parts of the novels' file."""
    parts = {name: [] for name in PARTS}
    for novel in text.split("=== ")[1:]:
        paragraphs = novel.strip().split("\n\n")[1:]  # without the title
        n = len(paragraphs) // 20
        for name, some in zip(PARTS, (paragraphs[:-2 * n], paragraphs[-2 * n:-n], paragraphs[-n:])):
            parts[name] += some
    return {name: "\n\n".join(some) for name, some in parts.items()}


def poems(text: str) -> dict[str, str]:
    """The parts of the poems' file."""
    parts = {name: [] for name in PARTS}
    for block in text.strip().split("\n\n"):
        number = int(hashlib.sha256(block.encode()).hexdigest(), 16) % 20
        parts[{0: "test", 1: "validation"}.get(number, "train")].append(block)
    return {name: "\n\n".join(some) for name, some in parts.items()}


@torch.no_grad()
def nats(model: GPT, ids: np.ndarray) -> float:
    """Mean nats per token in windows that overlap by half, of which the second half counts."""
    window, half = model.config.max_len, model.config.max_len // 2
    model.eval()
    total = 0.0
    for start in progress(range(0, len(ids) - 1, half), "test"):
        begin = max(0, start - half)
        row = torch.from_numpy(ids[begin:begin + window + 1].astype(np.int64))[None]
        logits = model(row[:, :-1])[0][0].log_softmax(-1)
        new = slice(start - begin, min(start - begin + half, row.shape[1] - 1))
        total -= logits.gather(1, row[0, 1:, None])[new].sum().item()
    return total / (len(ids) - 1)


@torch.no_grad()
def sample(model: GPT, tokenizer: BPETokenizer, prompt: str, n: int, seed: int) -> str:
    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt)])
    n = min(n, model.config.max_len - ids.shape[1])
    ids = generate(model, ids, n, temperature=0.8, top_p=0.95,
                   generator=torch.Generator().manual_seed(seed))
    return tokenizer.decode(ids[0].tolist())


def prepared(recipe: Recipe, data: Path, out: Path) -> tuple[BPETokenizer, dict[str, str], dict]:
    """Tokenizer, texts and tokens; what takes a while is kept in the folder."""
    text = gzip.open(data, "rt", encoding="utf-8").read()
    texts = (novels if recipe.text == "novels" else poems)(text)
    path = out / "tokenizer.json"
    if not path.exists():
        pattern = {"pattern": ONE_CHARACTER} if recipe.text == "poems" else {}
        BPETokenizer.train(texts["train"], recipe.vocab_size, **pattern).save(path)
    tokenizer, tokens = BPETokenizer.load(path), {}
    for name in PARTS:
        file = out / f"{name}.npy"
        if not file.exists():
            np.save(file, np.array(tokenizer.encode(texts[name]), np.uint16))
        tokens[name] = np.load(file)
    return tokenizer, texts, tokens


def learn(recipe: Recipe, tokenizer: BPETokenizer, tokens: dict, seed: int, out: Path) -> Run:
    """Train, or go on; samples at 1 %, 10 % and 100 %."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(tokenizer.vocab_size, **recipe.shape))
    run = Run(model, TrainConfig(**recipe.config, seed=seed))
    moments = {run.config.max_steps // share for share in (100, 10, 1)}
    with RunFolder(out / "run", describe(run, tokens["train"], tokens["validation"])) as folder:
        folder.resume(run)
        if run.step == 0:
            seed_everything(seed)
        for entry in kept(folder, run, steps(run, tokens["train"], tokens["validation"])):
            if "val_loss" in entry or run.step % 20 == 0:
                print(json.dumps(entry), flush=True)
            if run.step in moments:
                state = torch.get_rng_state()
                with open(out / "samples.txt", "a", encoding="utf-8") as file:
                    for prompt in recipe.prompts:
                        file.write(f"--- step {run.step}\n{sample(model, tokenizer, prompt, 120, seed)}\n")
                model.train()
                torch.set_rng_state(state)
    return run


def ship(name: str, recipe: Recipe, run: Run, tokenizer: BPETokenizer, texts: dict, tokens: dict,
         out: Path) -> None:
    """The model in eight bits, its tokenizer and its samples into the package; what it costs into the ledger.

    The model is measured as it is shipped, on the test part, beside Kneser–Ney on the same tokens.
    """
    MODELS.mkdir(exist_ok=True)
    save_int8(run.model, MODELS / f"{name}.safetensors")
    tokenizer.save(MODELS / f"{name}.json")
    shutil.copy(out / "samples.txt", MODELS / f"{name}.samples.txt")
    model, test = load_int8(MODELS / f"{name}.safetensors"), tokens["test"]
    counts = NGramLM(recipe.counting_order, model.config.vocab_size, smoothing="kneser-ney")
    counts.fit(tokens["train"])
    text = "tang.txt.gz" if recipe.text == "poems" else "austen.txt.gz"
    bench = common.Bench("models", command=f"python benchmarks/models.py {name} --data {text} --out runs/{name}")
    c = run.config
    seconds = sum(c.batch_size * c.seq_len / entry["tokens_per_second"] for entry in run.history)
    per_byte = len(test) / math.log(2) / len(texts["test"].encode())
    losses = {"": nats(model, test), "_float32": nats(run.model, test),
              "_kneser_ney": -counts.log_prob(test) / len(test)}
    for key, loss in losses.items():
        bench.report(f"{name}{key}", loss * per_byte, "bits per byte", nats_per_token=loss,
                     order=recipe.counting_order, parameters=sum(p.numel() for p in model.parameters()),
                     steps=run.step, seconds=seconds, threads=torch.get_num_threads(), seed=c.seed,
                     tokens_read=run.step * c.batch_size * c.seq_len, train_tokens=len(tokens["train"]),
                     test_tokens=len(test), vocab_size=tokenizer.vocab_size, shape=recipe.shape,
                     config=recipe.config, validation=[[entry["step"], entry["val_loss"]]
                                                       for entry in run.history if "val_loss" in entry])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.name]
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer, texts, tokens = prepared(recipe, options.data, options.out)
    run = learn(recipe, tokenizer, tokens, options.seed, options.out)
    ship(options.name, recipe, run, tokenizer, texts, tokens, options.out)


if __name__ == "__main__":
    main()
