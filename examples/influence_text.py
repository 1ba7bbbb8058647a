"""Which code made a small language model write this? A page of EK-FAC influence on its training.

A transformer of 0.6 million parameters learns the sources of a part of Python's standard library,
cut into windows of lines; nothing is downloaded. For each query (a prompt, and the completion that
is to be explained) all windows are scored in one pass, and the page shows the strongest ones with
their tokens shaded. The model and the tokenizer are a few lines each: those of Hugging Face go the
same way, `curvlib.influence.for_causal_lm(model, tokenizer, texts)`.
Run: python examples/influence_text.py
"""

import importlib
import inspect
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlib.influence.language import for_causal_lm

MODULES = ["bisect", "contextlib", "csv", "fractions", "graphlib", "optparse", "queue"]
MODULES += ["statistics", "string"]
QUERIES = [
    ("    def __enter__(self):\n        ", "return self"),
    ("    if n < 1:\n        raise ", "StatisticsError('mean requires at least one data point')"),
    ("        if isinstance(other, ", "Fraction):\n            return NotImplemented"),
    ("    def put(self, item, block=True, timeout=None):\n        with self.", "not_full:"),
    ("    parser.", "add_option('--verbose', action='store_true')"),
]
LENGTH, WIDTH, DEPTH, HEADS, STEPS, BATCH = 96, 96, 3, 4, 300, 16


# ---------------------------------------------------------------------- texts and tokens
def words(text: str) -> list[str]:
    """Names, numbers, runs of spaces, and single characters."""
    return re.findall(r"[^\W\d_]+|\n| +|.", text)


class Tokenizer:
    """Frequent words as they are, others by their characters; called as those of Hugging Face."""

    def __init__(self, texts: list[str], least: int = 6) -> None:
        counts = Counter(word for text in texts for word in words(text))
        letters = sorted({c for text in texts for c in text} | set(map(chr, range(32, 127))))
        frequent = sorted(w for w, n in counts.items() if n >= least and len(w) > 1)
        self.ids = {
            piece: i for i, piece in enumerate(["\N{REPLACEMENT CHARACTER}", *letters, *frequent])
        }

    def __call__(self, texts: list[str], **_: bool) -> dict[str, list[list]]:
        ids, offsets = [], []
        for text in texts:
            spans = []
            for match in re.finditer(r"[^\W\d_]+|\n| +|.", text):
                start, stop = match.span()
                if match.group() in self.ids:
                    spans.append((start, stop))
                else:
                    spans += [(i, i + 1) for i in range(start, stop)]
            offsets.append(spans)
            ids.append([self.ids.get(text[a:b], 0) for a, b in spans])
        return {"input_ids": ids, "offset_mapping": offsets}


def windows(name: str, source: str, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """A source in windows of whole lines, and where each is from."""
    lines = source.splitlines(keepends=True)
    sizes = [len(own) for own in tokenizer(lines)["input_ids"]]
    found, first = [], 0
    for i in range(1, len(lines) + 1):
        if i == len(lines) or sum(sizes[first : i + 1]) > LENGTH:
            text = "".join(lines[first:i])
            if len(text.strip()) > 20 and sum(sizes[first:i]) <= LENGTH:
                found.append((text, f"{name}, lines {first + 1}-{i}"))
            first = i
    return found


# -------------------------------------------------------------------------------- model
class Block(nn.Module):
    """Attention and a perceptron, each after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Logits of the next token, [N, T, V]."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(4 * LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.place[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def trained(model: nn.Module, tokens: list[list[int]]) -> nn.Module:
    """AdamW on random windows."""
    ids = torch.zeros(len(tokens), LENGTH + 1, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, own in enumerate(tokens):
        kept = torch.tensor(own[: LENGTH + 1])
        ids[i, : len(kept)] = labels[i, : len(kept)] = kept
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(ids), (BATCH,))
        loss = F.cross_entropy(model(ids[batch, :-1]).mT, labels[batch, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"trained: loss {loss:.2f} nats a token in the last batch")
    return model.eval()


torch.manual_seed(0)
start = time.perf_counter()
sources = {name: inspect.getsource(importlib.import_module(name)) for name in MODULES}
tokenizer = Tokenizer(list(sources.values()))
pairs = [pair for name, source in sources.items() for pair in windows(name, source, tokenizer)]
texts, places = [text for text, _ in pairs], [place for _, place in pairs]
tokens = tokenizer(texts)["input_ids"]
print(f"{len(texts)} windows, {sum(map(len, tokens))} tokens, {len(tokenizer.ids)} different")
model = trained(Transformer(len(tokenizer.ids)), tokens)
print(f"{time.perf_counter() - start:.0f} s so far")

influence = for_causal_lm(
    model, tokenizer, texts, max_length=LENGTH + 1, batch_size=64, unit="nats"
)
top = influence.top(QUERIES, k=10)
print(f"{time.perf_counter() - start:.0f} s so far")

for q, (prompt, completion) in enumerate(QUERIES):
    print(f"\n{prompt.strip()} [{completion.strip()}]")
    for i, score in zip(top.indices[q, :3].tolist(), top.scores[q, :3].tolist(), strict=True):
        print(f"  {score:+.4f} nats  {places[i]}")

folder = Path("curvlib-out")
folder.mkdir(exist_ok=True)
page = influence.to_html(
    top,
    folder / "influence_text.html",
    QUERIES,
    captions=places,
    title="Which code taught the model this?",
)
print(f"\nwrote {page}")
