"""Models of Hugging Face transformers, built from their configuration (nothing is downloaded)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlib as cl
from tests.problems import columns, error, snapshot

transformers = pytest.importorskip("transformers", reason="pip install 'curvlib[hf]'")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning"),
]


def _gpt2(attention: str) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=7,
        n_positions=5,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=4,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.1,  # must not act in eval mode
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).double().eval()


def _batches() -> list[dict[str, Tensor]]:
    """Unequal batches, labels masked unequally, padding on the right."""
    g = torch.Generator().manual_seed(1)
    batches = []
    for n, padding in ((2, 0), (1, 2), (3, 1)):
        ids = torch.randint(7, (n, 5), generator=g)
        mask = torch.ones_like(ids)
        mask[0, 5 - padding :] = 0
        labels = ids.masked_fill((mask == 0) | (torch.rand(n, 5, generator=g) < 0.3), -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def _oracle(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Hessian and GGN of the mean over all valid shifted tokens of all batches."""
    params = dict(model.named_parameters())
    theta = torch.cat([p.detach().flatten() for p in params.values()])

    def logits(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in params.values()])
        named = {n: q.view_as(p) for (n, p), q in zip(params.items(), parts, strict=True)}
        rows = []
        for batch in batches:
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            out = torch.func.functional_call(model, named, (), inputs).logits
            rows.append(out[:, :-1].flatten(0, 1))
        return torch.cat(rows)

    targets = torch.cat([b["labels"][:, 1:].flatten() for b in batches])
    with sdpa_kernel(SDPBackend.MATH):
        H = torch.autograd.functional.hessian(lambda t: F.cross_entropy(logits(t), targets), theta)
        J = torch.autograd.functional.jacobian(logits, theta).flatten(0, 1)
        z = logits(theta).detach()
    p = z.softmax(1)
    valid = targets != -100
    G = torch.zeros_like(H)
    for t in range(len(z)):
        if valid[t]:
            rows = J[t * 7 : (t + 1) * 7]
            G += rows.T @ ((torch.diag(p[t]) - torch.outer(p[t], p[t])) @ rows)
    return H, G / int(valid.sum())


def _shifted(batch: Any) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    return _oracle(_gpt2("eager"), _batches())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2_with_its_own_loss(attention: str, truth: tuple[Tensor, Tensor]) -> None:
    model = _gpt2(attention)
    before = snapshot(model)
    risk = cl.Risk(model, lambda out, batch: out.loss, _batches(), weight=_shifted)
    H, _ = truth
    assert 100 < risk.space.size == len(H) < 400
    assert "lm_head.weight" not in risk.space.names  # tied to the embedding
    V = columns(len(H), 3)
    assert error(cl.hessian(risk) @ V, H @ V) < 1e-6  # its loss casts logits to float32
    snapshot(model).assert_same(before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dict", "BatchEncoding"])
def test_gpt2_with_logits(attention: str, kind: str, truth: tuple[Tensor, Tensor]) -> None:
    batches: list[Any] = _batches()
    if kind == "BatchEncoding":
        batches = [transformers.BatchEncoding(b) for b in batches]
    risk = cl.Risk(
        _gpt2(attention),
        nn.CrossEntropyLoss(),
        batches,
        forward=lambda m, b: (
            m(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1].mT
        ),
        target=lambda b: b["labels"][:, 1:],
    )
    H, G = truth
    V = columns(len(H), 3)
    assert error(cl.hessian(risk) @ V, H @ V) < 1e-8
    assert error(cl.ggn(risk) @ V, G @ V) < 1e-8
    assert error(cl.fisher(risk, kind="type2") @ V, G @ V) < 1e-8


def test_bert_for_classification() -> None:
    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=6,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).double().eval()
    g = torch.Generator().manual_seed(0)
    ids, y = torch.randint(9, (4, 6), generator=g), torch.randint(3, (4,), generator=g)
    whole = {"input_ids": ids, "labels": y}
    split = [{"input_ids": ids[:1], "labels": y[:1]}, {"input_ids": ids[1:], "labels": y[1:]}]
    risk = cl.Risk(model, lambda o, b: o.loss, split, weight=lambda b: len(b["labels"]))
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(**whole).loss
        grads = torch.autograd.grad(loss, params, create_graph=True)
        v = columns(risk.space.size, 1)[:, 0]
        parts = torch.split(v, [p.numel() for p in params])
        dot = sum((g.flatten() * q).sum() for g, q in zip(grads, parts, strict=True))
        hv = torch.cat([h.flatten() for h in torch.autograd.grad(dot, params)])
    assert error(cl.hessian(risk) @ v, hv) < 1e-8
