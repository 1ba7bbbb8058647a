r"""Influence for causal language models of Hugging Face, and whatever is called like them.

The loss of a text :math:`x_1 \dots x_T` is :math:`-\sum_t \log p(x_t \mid x_{<t})`, and a query's
that of its completion alone. The score of a training text says how much its presence lowers the
query's loss (:mod:`curvlib.influence.influence`), and the part of its token ``t`` is what the
gradient *at this position* contributes: with attention, this is of the prediction of every later
token, too (Grosse et al., "Studying large language model generalization with influence functions",
2023).

Scores are about the linear layers of the transformer's blocks, not the embedding and the head:
their Kronecker factors are as large as the vocabulary. Grosse et al. take those of the MLPs alone:
``params=["*.mlp.*"]``. The Fisher matrix is sampled: a target is drawn for each
token from the model's own prediction.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.core.operator import LinearOperator
from curvlib.core.run import Progress
from curvlib.core.space import ParamSelection
from curvlib.influence.influence import Influence
from curvlib.influence.result import InfluenceScores, SelfInfluence, TopInfluence
from curvlib.influence.texts import Text, TokenizedText, text_batches, tokenized

_PADDINGS = ("longest", "batch")


class LanguageInfluence:
    """Influence of training texts on queries: made by :func:`for_causal_lm`.

    Attributes:
        influence: The influence on batches of tokens, for functions that take one; they get
            queries as :meth:`batches`.
        train: The training texts.
    """

    def __init__(
        self,
        influence: Influence,
        train: Sequence[TokenizedText],
        encode: Callable[[Sequence[Text]], list[TokenizedText]],
        batch: Callable[[Sequence[TokenizedText]], list[dict[str, Tensor]]],
    ) -> None:
        self.influence = influence
        self.train = tuple(train)
        self._encode = encode
        self._batch = batch

    def __repr__(self) -> str:
        tokens = sum(len(text) for text in self.train)
        return f"LanguageInfluence({len(self.train)} texts, {tokens} tokens, {self.influence!r})"

    def top(self, query: Text | Sequence[Text], k: int = 50, **settings: Any) -> TopInfluence:
        """The strongest proponents and opponents of each query.

        Args:
            query: Texts, of which the loss of all tokens is explained, and ``(prompt,
                completion)`` pairs, of which the completion's is. One text or pair is one query.
            k: Proponents.
            settings: As of :meth:`curvlib.influence.influence.Influence.top`, save ``train``.

        Raises:
            TypeError: If a query is no text, or ``train=`` is given.
            ValueError: If a query is too long for the model or has no token whose loss counts, or
                as of :meth:`~curvlib.influence.influence.Influence.top`.
        """
        return self.influence.top(self.batches(query), k, **_own(settings))

    def scores(self, query: Text | Sequence[Text], **settings: Any) -> InfluenceScores:
        """Scores of all training texts, ``[Q, N]``.

        Args:
            query: As of :meth:`top`.
            settings: As of :meth:`curvlib.influence.influence.Influence.scores`, save ``train``.

        Raises:
            TypeError: As :meth:`top`.
            ValueError: As :meth:`top`.
        """
        return self.influence.scores(self.batches(query), **_own(settings))

    def self_scores(self) -> SelfInfluence:
        """Influence of training texts on themselves, ``[N]``."""
        return self.influence.self_scores()

    def queries(self, query: Text | Sequence[Text]) -> list[TokenizedText]:
        """Queries as the model sees them: see :meth:`top`.

        Raises:
            TypeError: As :meth:`top`.
            ValueError: As :meth:`top`.
        """
        one = isinstance(query, (str, tuple))
        return self._encode([query] if one else query)  # type: ignore[list-item]  # it is one

    def batches(self, query: Text | Sequence[Text]) -> list[dict[str, Tensor]]:
        """The batches of queries: see :meth:`top`.

        Raises:
            TypeError: As :meth:`top`.
            ValueError: As :meth:`top`.
        """
        return self._batch(self.queries(query))

    def to_html(
        self,
        top: TopInfluence,
        path: str | os.PathLike[str],
        query: Text | Sequence[Text],
        **settings: Any,
    ) -> Path:
        """Writes a page of what was found, with the tokens of training texts shaded.

        Args:
            top: What :meth:`top` returned.
            path: The file.
            query: The queries that it returned it for.
            settings: As of :meth:`curvlib.influence.result.TopInfluence.to_html`, such as
                ``captions=`` of the training texts.

        Raises:
            ValueError: If there are not as many queries as ``top`` has.
        """
        found = self.queries(query)
        if len(found) != len(top.indices):
            raise ValueError(f"expected the {len(top.indices)} queries of top, got {len(found)}")
        settings.setdefault("queries", [list(text.pieces) for text in found])
        settings.setdefault("query_captions", [_explained(text) for text in found])
        settings.setdefault("train", lambda i: list(self.train[i].pieces))
        return top.to_html(path, **settings)

    def tokens(
        self, top: TopInfluence, query: int, place: int, *, opponents: bool = False
    ) -> list[tuple[str, float]]:
        """Tokens of a text that was found and their parts of its score, in order.

        Args:
            top: What :meth:`top` returned.
            query: Number of the query.
            place: Which of its proponents, 0 for the strongest.
            opponents: Whether to take its opponents instead.

        Raises:
            ValueError: If ``top`` was made with ``per_token=False``.
        """
        scores = top.bottom_per_token if opponents else top.per_token
        if scores is None:
            raise ValueError("the scores of tokens were not kept; use top(..., per_token=True)")
        indices = top.bottom_indices if opponents else top.indices
        pieces = self.train[int(indices[query, place])].pieces
        return list(zip(pieces, scores[query, place, : len(pieces)].tolist(), strict=True))


def for_causal_lm(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Sequence[Text],
    *,
    curvature: str | LinearOperator | None = None,
    params: ParamSelection = None,
    max_length: int | None = None,
    batch_size: int = 8,
    padding: str = "longest",
    damping: float | None = None,
    relative: bool = True,
    unit: str = "inner_product",
    fit: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: Progress = None,
) -> LanguageInfluence:
    """Influence of texts that a causal language model was trained on.

    Three lines: ``inf = for_causal_lm(model, tokenizer, texts)``,
    ``top = inf.top([("The capital of France is", " Paris")], k=20)``, and
    ``inf.tokens(top, query=0, place=0)``, or ``inf.to_html(top, "influence.html", queries)``.

    Args:
        model: Of Hugging Face, or any module that takes ``input_ids`` (and ``attention_mask``,
            ``position_ids``, if it has them) and returns ``[N, T, V]`` logits, or something with
            ``.logits``. It is left as it is.
        tokenizer: A fast one of Hugging Face, or a function that takes the same arguments and
            returns lists ``input_ids`` and ``offset_mapping`` (``special_tokens_mask``).
        texts: The training texts, each one example; ``(prompt, completion)`` pairs if the model
            was trained on completions alone. Cut documents into windows as in training.
        curvature: As of :class:`curvlib.influence.influence.Influence`. Default: EK-FAC.
        params: Parameters. Default: linear layers of the blocks, not embedding and head.
        max_length: Tokens of a training text that are kept, at most. Default: as many as the model
            takes. A warning tells how many texts are cut.
        batch_size: Texts of a batch.
        padding: ``"longest"``: all texts are padded to the longest, so that the sampled Fisher
            matrix does not depend on batches. ``"batch"``: to the longest of their batch, which is
            faster for texts of different length.
        damping: As of :class:`~curvlib.influence.influence.Influence`, as are
        relative: this,
        unit: this, and
        fit: this; ``{"fisher": "mc"}`` is the default here, with padding left out of the factors.
        device: Where batches are moved. Default: the parameters' device.
        progress: Whether to show bars: see :data:`curvlib.core.run.Progress`.

    Raises:
        TypeError: If the model is no module, the tokenizer gives no offsets, or texts are none.
        ValueError: If an argument is out of range, dropout is active, the tokenizer has more tokens
            than the model, or the linear layers are unknown.

    Example:
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.body = torch.nn.Embedding(128, 4), torch.nn.Linear(4, 4)
        ...
        ...     def forward(self, input_ids):
        ...         x = self.embed(input_ids)
        ...         return (x + self.body(x).tanh()) @ self.embed.weight.T
        >>> def characters(texts, **options):
        ...     return {
        ...         "input_ids": [[ord(c) for c in text] for text in texts],
        ...         "offset_mapping": [[(i, i + 1) for i in range(len(text))] for text in texts],
        ...     }
        >>> texts = ["abab", "cdcd", "abba"]
        >>> inf = for_causal_lm(Model(), characters, texts, params="body.*", progress=False)
        >>> top = inf.top([("ab", "ab")], k=1)
        >>> "".join(piece for piece, score in inf.tokens(top, query=0, place=0)) in texts
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model, got {type(model).__name__}; load one with "
            "transformers.AutoModelForCausalLM.from_pretrained(...) (pip install 'curvlib[hf]')"
        )
    if not callable(tokenizer):
        raise TypeError(
            f"expected a tokenizer, got {type(tokenizer).__name__}; load one with "
            "transformers.AutoTokenizer.from_pretrained(...) (pip install 'curvlib[hf]')"
        )
    if isinstance(texts, (str, tuple)):
        raise TypeError("texts= is a list of texts, got one; pass [text]")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}= needs a positive number, got {value}")
    if padding not in _PADDINGS:
        raise ValueError(f"padding= is one of {', '.join(map(repr, _PADDINGS))}, got {padding!r}")
    _require_no_dropout(model)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    most = min((size for size in (max_length, limit) if size is not None), default=None)
    train = tokenized(tokenizer, texts, most)
    _require_known_tokens(model, train)
    cut = sum(text.cut for text in train)
    if cut:
        warnings.warn(
            f"{cut} of {len(train)} texts are longer than {most} tokens, and what is beyond is "
            "left out; cut them into windows as in training",
            UserWarning,
            stacklevel=2,
        )

    def batch(some: Sequence[TokenizedText]) -> list[dict[str, Tensor]]:
        width = max(len(text) for text in some) if padding == "longest" else None
        return text_batches(some, batch_size, width=width, padding=_padding_id(tokenizer))

    def encode(query: Sequence[Text]) -> list[TokenizedText]:
        found = tokenized(tokenizer, query)
        for i, text in enumerate(found):
            if limit is not None and len(text) > limit:
                raise ValueError(
                    f"query {i} has {len(text)} tokens, and the model takes {limit}; shorten it"
                )
        _require_known_tokens(model, found)
        return found

    influence = Influence(
        model,
        nn.CrossEntropyLoss(),
        batch(train),
        curvature,
        params=linear_layers(model) if params is None else params,
        forward=_forward(model),
        target=lambda one: one["labels"][:, 1:],
        device=device,
        damping=damping,
        relative=relative,
        unit=unit,
        fit=_fit(curvature, fit),
        progress=progress,
    )
    return LanguageInfluence(influence, train, encode, batch)


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """The linear layers between the embedding and the head that have parameters to train.

    Raises:
        ValueError: If the model does not tell which its head is, or there is none.
    """
    head: Any = getattr(model, "get_output_embeddings", None)
    if head is None:
        raise ValueError(
            f"{type(model).__name__} does not tell which layer its head is (it has no "
            "get_output_embeddings); name the layers with params=, such as ['blocks.*']"
        )
    ends = [head(), *(m for m in model.modules() if isinstance(m, nn.Embedding))]
    outside = {id(p) for m in ends if isinstance(m, nn.Module) for p in m.parameters()}
    found = []
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            own = list(module.parameters(recurse=False))
            if any(p.requires_grad for p in own) and not any(id(p) in outside for p in own):
                found.append(module)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer with parameters that require a gradient, "
            "besides its head; name parameters with params="
        )
    return found


# ----------------------------------------------------------------------- private
def _explained(text: TokenizedText) -> str:
    """What of a query is explained."""
    counted = [p for p, own in zip(text.pieces, text.counted, strict=True) if own]
    whole = all(own or alone for own, alone in zip(text.counted, text.special, strict=True))
    return "all tokens are explained" if whole else f"explained: {''.join(counted)}"


def _own(settings: dict[str, Any]) -> dict[str, Any]:
    if "train" in settings:
        raise TypeError(
            "scores are of the texts that for_causal_lm got; for others, call it with these and "
            "curvature=inf.influence.preconditioner.operator"
        )
    return settings


def _forward(model: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
    """Logits that predict the next token, ``[N, V, T - 1]``."""
    base: Any = getattr(model, "get_base_model", None)  # adapters pass everything on
    takes = inspect.signature((model if base is None else base()).forward).parameters

    def forward(own: nn.Module, batch: Any) -> Tensor:
        ids = batch["input_ids"]
        named: dict[str, Any] = {"attention_mask": batch["attention_mask"], "use_cache": False}
        # of each example its own: those that all share would send them through one by one
        named["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        output = own(input_ids=ids, **{k: v for k, v in named.items() if k in takes})
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[:, :-1].transpose(1, 2)

    return forward


def _fit(
    curvature: str | LinearOperator | None, fit: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    own = dict(fit or {})
    if curvature in (None, "ekfac", "kfac"):
        return {"fisher": "mc", "mask": _mask, **own}
    return {"fisher": "mc", **own} if curvature == "diagonal" else own


def _mask(batch: Any) -> Tensor:
    kept: Tensor = batch["attention_mask"].bool()
    return kept


def _padding_id(tokenizer: Any) -> int:
    found = getattr(tokenizer, "pad_token_id", None)
    return 0 if found is None else int(found)


def _require_no_dropout(model: nn.Module) -> None:
    drops = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    for name, module in model.named_modules():
        if module.training and isinstance(module, drops) and module.p > 0.0:
            raise ValueError(
                f"dropout is active ({name!r}), so losses are random; call model.eval() first"
            )


def _require_known_tokens(model: nn.Module, texts: Sequence[TokenizedText]) -> None:
    own: Any = getattr(model, "get_input_embeddings", None)
    embedding = None if own is None else own()
    if not isinstance(embedding, nn.Embedding):
        return
    highest = max(max(text.ids) for text in texts)
    if highest >= embedding.num_embeddings:
        raise ValueError(
            f"the tokenizer gives id {highest}, but the model has {embedding.num_embeddings} "
            "tokens; pass the tokenizer of this model"
        )
