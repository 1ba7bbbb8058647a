"""Influence for causal language models: autograd on each text alone is the oracle."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlib.influence.language import LanguageInfluence, for_causal_lm, linear_layers
from curvlib.influence.matrix import score_matrix
from curvlib.influence.texts import text_batches, tokenized
from tests.operators.factored import F64, relative, seeded
from tests.problems import snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TEXTS = [
    "the cat sat on a mat",
    "the dog ate the cat",
    "a cat",
    "on the mat the dog sat",
    "the mat ate a dog on a cat",
]
QUERIES: list[Any] = [("the cat sat", " on a dog"), "a dog sat"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "a", "cat", "dog", "mat", "sat", "ate", "on"]


def tokenizer_of(*, special: bool = True) -> Any:
    """Words, as a fast tokenizer of transformers; nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        words.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>"
    )


def bytes_of() -> Any:
    """A byte-level tokenizer without merges: characters beyond ASCII are several tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own)


def gpt2(**changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": len(WORDS),
        "n_positions": 12,
        "n_embd": 6,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return seeded(transformers.GPT2LMHeadModel(transformers.GPT2Config(**options | changes)))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return seeded(transformers.LlamaForCausalLM(config))


class Plain(nn.Module):
    """Not of transformers: a mean over what came before, and logits as a tensor."""

    def __init__(self, vocabulary: int = 128, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).cumsum(1)
        return self.head(x + self.body(x).tanh())


def characters(texts: list[str], **options: Any) -> dict[str, Any]:
    return {
        "input_ids": [[ord(c) for c in text] for text in texts],
        "offset_mapping": [[(i, i + 1) for i in range(len(text))] for text in texts],
    }


def gradient(inf: LanguageInfluence, ids: list[int], first: int) -> Tensor:
    """Of the loss of tokens ``first`` and later of one text alone, without padding, ``[P]``."""
    model, params = inf.influence.risk.model, inf.influence.risk.params
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    each = -logits.gather(1, tokens[0, 1:, None])[:, 0]
    grads = torch.autograd.grad(each[max(first - 1, 0) :].sum(), list(params.values()))
    return torch.cat([g.reshape(-1) for g in grads])


def ids_of(text: str) -> list[int]:
    return [1, *(WORDS.index(w) for w in text.split()), 2]


# ------------------------------------------------------------------------------ scores
@pytest.mark.oracle
@pytest.mark.parametrize("model", [gpt2, llama])
@pytest.mark.parametrize("padding", ["longest", "batch"])
def test_scores_are_products_of_autograd_gradients(model: Any, padding: str) -> None:
    """Of completions alone, of texts with padding and special tokens."""
    inf = for_causal_lm(
        model(),
        tokenizer_of(),
        TEXTS,
        curvature="identity",
        batch_size=2,
        padding=padding,
        progress=False,
    )
    rows = torch.stack([gradient(inf, ids_of(text), 1) for text in TEXTS])
    # "<s> the cat sat | on a dog </s>": of the end, only the completion's own tokens count
    completion = gradient(inf, ids_of("the cat sat on a dog")[:-1], 4)
    asked = torch.stack([completion, gradient(inf, ids_of("a dog sat"), 1)])
    expected = asked @ rows.T
    assert relative(inf.scores(QUERIES).scores, expected) < 1e-11
    top = inf.top(QUERIES, k=5, bottom=1)
    order = expected.sort(1, descending=True)
    assert torch.equal(top.indices, order.indices)
    assert relative(top.scores, order.values) < 1e-11
    assert top.per_token is not None
    assert relative(top.per_token.sum(2), order.values) < 1e-11
    for q in range(2):
        for place in range(5):
            pairs = inf.tokens(top, q, place)
            text = TEXTS[int(top.indices[q, place])]
            assert "".join(piece for piece, _ in pairs) == f"<s>{text}</s>"
            assert len(pairs) == len(text.split()) + 2
            total = sum(score for _, score in pairs)  # nothing is on the padding
            assert total == pytest.approx(float(top.scores[q, place]), rel=1e-9)
    opponents = inf.tokens(top, 0, 0, opponents=True)
    assert sum(s for _, s in opponents) == pytest.approx(float(expected[0].min()), rel=1e-9)


@pytest.mark.oracle
def test_a_token_has_what_its_position_gives() -> None:
    """The gradient at one position of every layer, by a mask on each layer's output gradient."""
    inf = for_causal_lm(gpt2(), tokenizer_of(), TEXTS, curvature="identity", progress=False)
    risk = inf.influence.risk
    query = gradient(inf, ids_of("a dog sat"), 1)
    top = inf.top("a dog sat", k=1)
    ids = torch.tensor([ids_of(TEXTS[int(top.indices[0, 0])])])
    pairs: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in risk.model.named_modules():
        if f"{name}.weight" in risk.params:

            def forward(module: Any, x: Any, y: Any, name: str = name) -> None:
                pairs[name] = [x[0][0].detach()]
                y.register_hook(lambda g: pairs[name].append(g[0]))

            handles.append(module.register_forward_hook(forward))
    logits = risk.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    (-logits.gather(1, ids[0, 1:, None]).sum()).backward()
    for handle in handles:
        handle.remove()
    expected = []
    for t in range(ids.shape[1]):
        rows = []
        for name in risk.params:
            x, g = pairs[name.rsplit(".", 1)[0]]
            rows.append(torch.outer(x[t], g[t]).reshape(-1) if name.endswith("weight") else g[t])
        expected.append(float(torch.cat(rows) @ query))
    risk.model.zero_grad(set_to_none=True)
    found = torch.tensor([score for _, score in inf.tokens(top, 0, 0)], dtype=F64)
    assert relative(found, torch.tensor(expected, dtype=F64)) < 1e-11


@pytest.mark.oracle
def test_the_default_is_a_sampled_ekfac_of_the_blocks() -> None:
    """The same for every batch size, and the model is left as it was."""
    model = gpt2()
    before = snapshot(model)
    found = []
    for size in (1, 2, 5):
        inf = for_causal_lm(model, tokenizer_of(), TEXTS, batch_size=size, progress=False)
        found.append(inf.scores(QUERIES).scores)
    assert relative(found[1], found[0]) < 1e-9
    assert relative(found[2], found[0]) < 1e-9
    op: Any = inf.influence.preconditioner.operator
    assert op.name == "EK-FAC"
    assert op.settings["fisher"] == "mc"
    blocks = {f"transformer.h.{i}" for i in range(2)}
    assert {".".join(n.split(".")[:3]) for n in inf.influence.risk.space.names} == blocks
    assert not any("ln_" in name for name in inf.influence.risk.space.names)
    assert "EK-FAC" in repr(inf)
    assert "5 texts, 37 tokens" in repr(inf)
    snapshot(model).assert_same(before)


@pytest.mark.oracle
def test_padding_is_not_in_the_factors() -> None:
    """The inputs' factor is that of the texts alone, whatever is beyond their ends."""
    inf = for_causal_lm(
        gpt2(), tokenizer_of(), TEXTS, fit={"fisher": "empirical"}, curvature="kfac", progress=False
    )
    op: Any = inf.influence.preconditioner.operator
    block = op.blocks_of["transformer.h.0.attn.c_attn"]
    found = (block.right[0] * block.eigenvalues[0].sum(0)) @ block.right[0].T
    model, rows = inf.influence.risk.model, []
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    handle = layer.register_forward_hook(lambda m, x, y: rows.append(x[0][0].detach()))
    for text in TEXTS:
        model(input_ids=torch.tensor([ids_of(text)]))
    handle.remove()
    joined = torch.cat([torch.cat([r, r.new_ones(len(r), 1)], 1) for r in rows])
    expected = joined.T @ joined
    assert relative(found / found.trace(), expected / expected.trace()) < 1e-9


def test_models_of_ones_own_and_functions_that_take_an_influence(tmp_path: Any) -> None:
    model = seeded(Plain())
    inf = for_causal_lm(
        model, characters, ["abab", "cdcd", "abba"], params="body.*", progress=False
    )
    queries = [("ab", "ab"), "dc"]
    scores = inf.scores(queries).scores
    matrix = score_matrix(
        inf.influence, inf.batches(queries), tmp_path / "m", dtype=F64, progress=False
    )
    assert relative(torch.from_numpy(matrix.rows()).mT, scores) < 1e-12
    assert inf.self_scores().scores.shape == (3,)
    assert [len(q) for q in inf.queries(queries)] == [4, 2]
    assert inf.scores(queries[0]).scores.shape == (1, 3)  # a tuple is one pair


def test_a_page_shows_texts_and_shades_their_tokens(tmp_path: Any) -> None:
    inf = for_causal_lm(
        seeded(Plain()), characters, ["ab<b", "cdcd", "abba"], params="body.*", progress=False
    )
    queries = [("ab", "<i>"), "dc"]
    top = inf.top(queries, k=3)
    page = inf.to_html(top, tmp_path / "page.html", queries, title="Here").read_text("utf-8")
    assert "explained: &lt;i&gt;" in page
    assert "all tokens are explained" in page
    assert "Here" in page
    shaded = re.sub("<[^>]*>", "", page)
    for text in ("ab&lt;b", "cdcd", "abba"):
        assert text in shaded
    for piece, score in inf.tokens(top, 0, 0):
        if abs(score) == max(abs(s) for _, s in inf.tokens(top, 0, 0)):
            assert re.search(rf'<span class="."[^>]*>{html.escape(piece)}</span>', page)
    with pytest.raises(ValueError, match="expected the 2 queries of top, got 1"):
        inf.to_html(top, tmp_path / "page.html", "dc")


# ------------------------------------------------------------------------------- texts
@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=2, max_size=12), min_size=1, max_size=4))
def test_pieces_join_to_the_text(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    texts = [text if len(text) > 1 else "ab" for text in texts]
    for text, found in zip(texts, tokenized(_BYTES(), texts), strict=True):
        assert "".join(found.pieces) == text
        assert len(found.pieces) == len(found.ids) == len(text.encode())


def _BYTES(cache: list[Any] = []) -> Any:  # noqa: B006, N802 (made once)
    if not cache:
        cache.append(bytes_of())
    return cache[0]


def test_what_counts_of_a_completion() -> None:
    words = tokenizer_of()
    (found,) = tokenized(words, [("the cat", " sat  on")])
    assert found.pieces == ("<s>", "the", " cat", " sat", "  on", "</s>")
    assert found.counted == (False, False, False, True, True, False)
    assert found.special == (True, False, False, False, False, True)
    (whole,) = tokenized(words, ["the cat "], 3)
    assert whole.cut
    assert whole.pieces == ("<s>", "the", " cat")
    (torn,) = tokenized(_BYTES(), [("a", "é")])  # a character of two tokens
    assert torn.pieces == ("a", "é", "")
    assert torn.counted == (False, True, True)
    (joined,) = tokenized(tokenizer_of(special=False), [("the ca", "t sat")])
    assert joined.counted == (False, True, True)  # "cat" has characters of both
    batches = text_batches([found, whole], 1, width=None, padding=0)
    assert [b["input_ids"].shape[1] for b in batches] == [6, 3]
    assert batches[0]["labels"].tolist() == [[-100, -100, -100, 9, 11, -100]]
    (wide,) = text_batches([whole], 2, width=5, padding=7)
    assert wide["input_ids"].tolist() == [[1, 4, 6, 7, 7]]
    assert wide["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert wide["labels"].tolist() == [[1, 4, 6, -100, -100]]


# ------------------------------------------------------------------------------- errors
class _Slow:
    is_fast = False

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        return {}


def _no_offsets(texts: list[str], **options: Any) -> dict[str, Any]:
    return {"input_ids": [[1, 2] for _ in texts]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "gpt2"}, TypeError, "expected a model, got str; load one .*curvlib.hf"),
        ({"tokenizer": "gpt2"}, TypeError, "expected a tokenizer, got str.*curvlib.hf"),
        ({"tokenizer": _Slow()}, TypeError, "_Slow does not tell which characters"),
        ({"tokenizer": _no_offsets}, TypeError, "expected 'offset_mapping' from the tokenizer"),
        ({"texts": "abc"}, TypeError, "list of texts, got one"),
        ({"texts": []}, ValueError, "at least one text, got none"),
        ({"texts": ["abc", 3]}, TypeError, "text 1 is a int; expected a str"),
        ({"texts": [("a", "b", "c")]}, TypeError, "text 0 is a tuple; expected a str"),
        ({"texts": ["abc", "d"]}, ValueError, "text 1 .'d'. has no token whose loss counts: its t"),
        ({"texts": [("ab", "")]}, ValueError, "its completion needs at least one token"),
        ({"texts": ["abc"], "max_length": 1}, ValueError, "counts within 1 tokens"),
        ({"texts": ["aé"]}, ValueError, "gives id 233, but the model has 128 tokens"),
        ({"batch_size": 0}, ValueError, "batch_size= needs a positive number, got 0"),
        ({"max_length": 0}, ValueError, "max_length= needs a positive number, got 0"),
        ({"padding": "left"}, ValueError, "padding= is one of 'longest', 'batch', got 'left'"),
        ({"params": None}, ValueError, "Plain does not tell which layer its head is"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    class Known(Plain):
        def get_input_embeddings(self) -> nn.Module:
            return self.embed

    model = Plain() if "params" in change else Known()
    options = {"model": model, "tokenizer": characters, "texts": ["abc"], "params": "body.*"}
    options |= change
    with pytest.raises(error, match=message):
        for_causal_lm(**options, progress=False)


def test_what_cannot_be_asked() -> None:
    inf = for_causal_lm(
        seeded(Plain()), characters, ["abab", "cdcd"], params="body.*", progress=False
    )
    for call in (inf.top, inf.scores):
        with pytest.raises(TypeError, match="scores are of the texts that for_causal_lm got"):
            call("ab", train=["abc"])
    top = inf.top("ab", k=1, per_token=False)
    for opponents in (False, True):
        with pytest.raises(ValueError, match="scores of tokens were not kept"):
            inf.tokens(top, 0, 0, opponents=opponents)


@pytest.mark.oracle
def test_too_long_and_random() -> None:
    model, words = gpt2(), tokenizer_of()
    with pytest.warns(UserWarning, match="1 of 5 texts are longer than 9 tokens"):
        inf = for_causal_lm(model, words, TEXTS, max_length=9, curvature="identity", progress=False)
    assert [len(text) for text in inf.train] == [8, 7, 4, 8, 9]
    long = "the cat sat on a mat the dog ate the cat"
    with pytest.raises(ValueError, match="query 0 has 13 tokens, and the model takes 12"):
        inf.top(long, k=1)
    with pytest.raises(ValueError, match=r"dropout is active \('transformer.drop'\)"):
        for_causal_lm(gpt2().train(), words, TEXTS, progress=False)


@pytest.mark.oracle
def test_which_layers() -> None:
    model = gpt2()
    names = {id(m): n for n, m in model.named_modules()}
    found = [names[id(m)] for m in linear_layers(model)]
    assert found[:4] == [f"transformer.h.0.{n}" for n in _GPT2_LAYERS]
    assert len(found) == 8
    untied = llama()
    names = {id(m): n for n, m in untied.named_modules()}
    assert "lm_head" not in [names[id(m)] for m in linear_layers(untied)]
    assert len(linear_layers(untied)) == 7
    for p in model.parameters():
        p.requires_grad_(False)
    model.get_submodule("transformer.h.1.mlp.c_fc").weight.requires_grad_(True)
    assert linear_layers(model) == [model.get_submodule("transformer.h.1.mlp.c_fc")]
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no linear layer with parameters that require a gradient"):
        linear_layers(model)


_GPT2_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
