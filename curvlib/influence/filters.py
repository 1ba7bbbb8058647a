r"""Filters: which training texts are worth a gradient, before any is computed.

A scan costs a forward and a backward pass for each training example. A filter picks candidates by
words alone, and only these are scanned (Grosse et al., "Studying large language model
generalization with influence functions", 2023, section 3.2):

:func:`tfidf`
    the cosine of TF-IDF vectors, as scikit-learn's ``TfidfVectorizer`` makes them;
:func:`bm25`
    Okapi BM25 (Robertson and Zaragoza, "The probabilistic relevance framework", 2009, equation
    3.15) with the idf of Lucene, which is never negative: for each term :math:`t` of the query, as
    often as it occurs there,

    .. math:: \log\Bigl(1 + \frac{N - n_t + 1/2}{n_t + 1/2}\Bigr)\,
              \frac{f_{td}\,(k_1 + 1)}{f_{td} + k_1 (1 - b + b\,|d| / \overline{|d|})}

    with :math:`f_{td}` its count in document :math:`d` and :math:`n_t` the documents that have it;

Filters by words find what reads alike and miss what is alike in another way. How much they miss is
measured, not assumed: :func:`~curvlib.influence.recall.recall` compares with the scores of a random
sample. ``merged(tfidf(...), uniform(...))`` joins the candidates of several filters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlib.influence.candidates import Candidates, require_counts

#: A text, or its tokens' ids.
Document = str | Sequence[int] | Tensor


def tfidf(
    train: Sequence[Document],
    queries: Sequence[Document],
    keep: int = 10_000,
    *,
    ignore: Collection[int] = (),
    **vectorizer: Any,
) -> Candidates:
    """The training texts with the largest TF-IDF cosine to each query.

    Args:
        train: Texts, or sequences of token ids (lists or 1-D integer tensors), in the order of the
            training data.
        queries: The same of the queries: prompt and completion together.
        keep: How many for each query, at most: texts that share no term with it are left out.
        ignore: Token ids that do not count, such as padding.
        vectorizer: Further arguments of scikit-learn's ``TfidfVectorizer``, such as
            ``ngram_range=(1, 2)``, ``sublinear_tf=True``, ``max_features=2**18``.

    Raises:
        ImportError: If scikit-learn is absent.
        TypeError: If documents are none of the kinds above, or of both.
        ValueError: If there are none, they have no term, or ``keep`` is not positive.

    Example:
        >>> found = tfidf(["a red fox", "two blue whales", "the fox ran"], ["foxes and a fox"])
        >>> found.per_query[0].tolist(), found.method
        ([0, 2], 'tfidf')
    """
    _, text = _sklearn()
    train, queries, tokenized = _documents(train, queries, ignore)
    if tokenized:
        vectorizer = {"analyzer": _identity, **vectorizer}
    fitted = text.TfidfVectorizer(**{"dtype": np.float64, **vectorizer})
    documents = _fitted(fitted, train)
    return _kept(
        documents,
        fitted.transform(queries),
        keep,
        "tfidf",
        {"ignore": sorted(ignore), **_plain(vectorizer)},
    )


def bm25(
    train: Sequence[Document],
    queries: Sequence[Document],
    keep: int = 10_000,
    *,
    k1: float = 1.2,
    b: float = 0.75,
    ignore: Collection[int] = (),
    **vectorizer: Any,
) -> Candidates:
    """The training texts with the largest BM25 score for each query.

    Args:
        train: As of :func:`tfidf`.
        queries: As of :func:`tfidf`.
        keep: As of :func:`tfidf`.
        k1: How soon repetition of a term stops counting; 0 counts presence alone.
        b: How far long documents are discounted, 0 to 1.
        ignore: Token ids that do not count, such as padding.
        vectorizer: Further arguments of scikit-learn's ``CountVectorizer``.

    Raises:
        ImportError: If scikit-learn is absent.
        TypeError: If documents are none of the kinds above, or of both.
        ValueError: If there are none, they have no term, or a number is out of range.

    Example:
        >>> found = bm25([[5, 6, 7], [5, 5, 8], [9, 9]], [[5, 8]], keep=2)
        >>> found.per_query[0].tolist()
        [1, 0]
    """
    sparse, text = _sklearn()
    if not (k1 >= 0.0 and 0.0 <= b <= 1.0):
        raise ValueError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1={k1} and b={b}")
    train, queries, tokenized = _documents(train, queries, ignore)
    if tokenized:
        vectorizer = {"analyzer": _identity, **vectorizer}
    fitted = text.CountVectorizer(**vectorizer)
    counts = sparse.csr_matrix(_fitted(fitted, train), dtype=np.float64)
    count = counts.shape[0]
    having = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log1p((count - having + 0.5) / (having + 0.5))
    length = np.asarray(counts.sum(1)).ravel()
    norm = k1 * (1.0 - b + b * length / length.mean())
    rows = np.repeat(np.arange(count), np.diff(counts.indptr))
    weights = counts.data * (k1 + 1.0) / (counts.data + norm[rows]) * idf[counts.indices]
    documents = sparse.csr_matrix((weights, counts.indices, counts.indptr), shape=counts.shape)
    settings = {"k1": k1, "b": b, "ignore": sorted(ignore), **_plain(vectorizer)}
    asked = sparse.csr_matrix(fitted.transform(queries), dtype=np.float64)
    return _kept(documents, asked, keep, "bm25", settings)


# ----------------------------------------------------------------------- private
def _sklearn() -> tuple[Any, Any]:
    """``scipy.sparse`` and the text part of scikit-learn."""
    try:
        from scipy import sparse
        from sklearn.feature_extraction import text
    except ImportError as error:
        raise ImportError(
            "filters by words need scikit-learn, which is not installed; run: "
            "pip install scikit-learn"
        ) from error
    return sparse, text


def _identity(tokens: list[int]) -> list[int]:
    return tokens


def _documents(
    train: Sequence[Document], queries: Sequence[Document], ignore: Collection[int]
) -> tuple[list[Any], list[Any], bool]:
    """Both as lists of texts, or of lists of ids; and whether they are ids."""
    out: list[list[Any]] = []
    kinds: set[bool] = set()
    for name, documents in (("training", train), ("query", queries)):
        if isinstance(documents, str) or len(documents) == 0:
            raise ValueError(f"expected a sequence of {name} documents, at least one of them")
        read = []
        for i, document in enumerate(documents):
            kinds.add(not isinstance(document, str))
            read.append(document if isinstance(document, str) else _ids(document, name, i))
        out.append(read)
    if len(kinds) > 1:
        raise TypeError("expected all documents as texts, or all as token ids, got both")
    if ignore and False in kinds:
        raise ValueError("ignore= lists token ids, but the documents are texts; use stop_words=")
    skipped = frozenset(ignore)
    if skipped:
        out = [[[t for t in tokens if t not in skipped] for tokens in read] for read in out]
    return out[0], out[1], True in kinds


def _ids(document: Any, name: str, index: int) -> list[int]:
    tokens = document.tolist() if isinstance(document, (Tensor, np.ndarray)) else document
    if not isinstance(tokens, (list, tuple)) or not all(
        isinstance(t, (int, np.integer)) for t in tokens
    ):
        raise TypeError(
            f"expected {name} document {index} as a text or a sequence of token ids (a list of "
            f"int, a 1-D integer tensor), got {type(document).__name__}"
        )
    return [int(t) for t in tokens]


def _fitted(vectorizer: Any, train: list[Any]) -> Any:
    try:
        return vectorizer.fit_transform(train)
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        raise ValueError(
            "the training documents have no term that counts: they are empty, of ignored ids, or "
            "of stop words and single characters; pass token_pattern= or analyzer='char'"
        ) from error


def _kept(
    documents: Any, queries: Any, keep: int, method: str, settings: dict[str, Any]
) -> Candidates:
    """The most similar documents of each query, from sparse rows; ties go to the first."""
    require_counts(keep=keep)
    per_query, similarity = [], []
    for q in range(queries.shape[0]):
        found = (documents @ queries[q].T).tocoo()
        rows, values = found.row[found.data > 0.0], found.data[found.data > 0.0]
        order = np.lexsort((rows, -values))[:keep]
        per_query.append(torch.from_numpy(rows[order].astype(np.int64)))
        similarity.append(torch.from_numpy(values[order].astype(np.float64)))
    return Candidates(
        indices=torch.cat(per_query).unique(),
        per_query=per_query,
        similarity=similarity,
        examples=documents.shape[0],
        method=method,
        settings={"keep": keep, **settings},
    )


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they can be written to a file."""
    kept = (bool, int, float, str)
    return {
        name: value if isinstance(value, kept) or value is None else repr(value)
        for name, value in settings.items()
        if value is not _identity
    }
