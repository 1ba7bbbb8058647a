"""Filters by words against formulas written out, and recall against a count by hand."""

from __future__ import annotations

import builtins
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib.core.result import Result
from curvlib.influence.candidates import Candidates, merged, uniform
from curvlib.influence.filters import bm25, tfidf
from curvlib.influence.recall import recall

tokens = st.lists(st.integers(0, 6), min_size=0, max_size=9)
some_tokens = st.lists(st.integers(0, 6), min_size=1, max_size=9)


def bm25_by_hand(train, query, k1, b):
    """Robertson and Zaragoza, 2009, with Lucene's idf, term by term."""
    N = len(train)
    mean = sum(map(len, train)) / N
    scores = []
    for document in train:
        counts, total = Counter(document), 0.0
        for term in query:  # as often as it occurs in the query
            n = sum(term in other for other in train)
            if n and term in counts:
                idf = math.log(1 + (N - n + 0.5) / (n + 0.5))
                f = counts[term]
                total += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(document) / mean))
        scores.append(total)
    return scores


def tfidf_by_hand(train, query):
    """Cosine of tf * (log((1 + N) / (1 + n)) + 1), scikit-learn's documented default."""
    N, terms = len(train), sorted({t for document in train for t in document})
    idf = [math.log((1 + N) / (1 + sum(t in d for d in train))) + 1 for t in terms]

    def vector(document):
        counts = Counter(document)
        v = np.array([counts[t] * w for t, w in zip(terms, idf, strict=True)])
        return v / max(np.linalg.norm(v), 1e-300)

    return [float(vector(d) @ vector(query)) for d in train]


def check(found, expected, keep):
    """Candidates are those with the largest expected scores, none of them zero."""
    indices, values = found.per_query[0].tolist(), found.similarity[0].tolist()
    positive = sum(value > 1e-12 for value in expected)
    assert len(indices) == min(keep, positive)
    assert values == pytest.approx([expected[i] for i in indices], rel=1e-12)
    assert values == pytest.approx(sorted(expected, reverse=True)[: len(values)], rel=1e-12)
    assert found.indices.tolist() == sorted(indices)


@given(
    st.lists(some_tokens, min_size=1, max_size=8), tokens, st.integers(1, 9), st.floats(0.0, 3.0)
)
@settings(max_examples=60, deadline=None)
def test_bm25_is_its_formula(train, query, keep, k1):
    found = bm25(train, [query], keep, k1=k1, b=0.6)
    check(found, bm25_by_hand(train, query, k1, 0.6), keep)


@given(st.lists(some_tokens, min_size=1, max_size=8), tokens, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_tfidf_is_its_formula(train, query, keep):
    check(tfidf(train, [query], keep), tfidf_by_hand(train, query), keep)


@pytest.mark.parametrize("method", [tfidf, bm25])
def test_a_text_is_found_by_its_words_and_by_its_ids(method):
    train = ["the cat sat", "a dog ran off", "the dog sat down", "nothing alike"]
    words = sorted({w for text in train for w in text.split()})
    ids = [[words.index(w) for w in text.split()] for text in train]
    by_word = method(train, ["dog sat"], token_pattern=r"\w+")
    by_id = method(ids, [torch.tensor([words.index("dog"), words.index("sat")])])
    assert by_word.per_query[0].tolist()[0] == 2
    assert 3 not in by_word.indices
    assert torch.equal(by_word.per_query[0], by_id.per_query[0])
    assert torch.equal(by_word.similarity[0], by_id.similarity[0])


@pytest.mark.parametrize("method", [tfidf, bm25])
def test_padding_is_ignored_and_ties_go_to_the_first(method):
    train = [[0, 0, 1], [2, 0], [1], [1, 0]]
    found = method(train, [[1, 0, 0]], ignore=[0])
    assert found.per_query[0].tolist() == [0, 2, 3]
    assert found.similarity[0].unique().numel() == 1


def test_the_union_of_queries_is_scanned_and_candidates_are_kept(tmp_path):
    found = bm25([[1], [2], [3], [1, 2]], [[1], [2], [9]], keep=1)
    assert [own.tolist() for own in found.per_query] == [[0], [1], []]
    assert found.indices.tolist() == [0, 1]
    assert found.share == 0.5
    path = found.save(tmp_path / "candidates.safetensors")
    loaded = Result.load(path)
    assert isinstance(loaded, Candidates)
    assert [own.tolist() for own in loaded.per_query] == [[0], [1], []]
    assert loaded.settings == {"keep": 1, "k1": 1.2, "b": 0.75, "ignore": []}


def test_settings_of_the_vectorizer_reach_it():
    train = ["red fox", "fox red", "blue fox"]
    pairs = tfidf(train, ["red fox"], ngram_range=(2, 2))
    assert pairs.per_query[0].tolist() == [0]
    assert pairs.settings["ngram_range"] == "(2, 2)"


def test_uniform_is_a_sample_that_repeats(rng_untouched):
    first, again, other = (uniform(500, 50, queries=2, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.per_query[0], again.per_query[1])
    assert not torch.equal(first.indices, other.indices)
    assert first.indices.unique().numel() == 50
    assert uniform(7, 50).indices.tolist() == list(range(7))


def test_uniform_favours_nothing():
    """Each of 40 examples is drawn in 10 of 40 places: counts over 400 seeds are binomial."""
    counts = torch.zeros(40)
    for seed in range(400):
        counts[uniform(40, 10, seed=seed).indices] += 1
    spread = math.sqrt(400 * 0.25 * 0.75)
    assert float((counts - 100).abs().max()) < 4.5 * spread
    assert 20 < float(((counts - 100) / spread).square().sum()) < 70  # chi square of 39


def test_merged_keeps_what_any_keeps_and_the_best_first():
    a = bm25([[1], [1, 1], [2], [3]], [[1], [2]])
    b = uniform(4, 2, queries=2, seed=0)
    both = merged(a, b)
    assert set(both.indices.tolist()) == set(a.indices.tolist()) | set(b.indices.tolist())
    for q in range(2):
        own, first = both.per_query[q].tolist(), a.per_query[q].tolist()
        assert own[: len(first)] == first
        assert sorted(own) == sorted(set(first) | set(b.per_query[q].tolist()))
    assert both.method == "bm25+uniform"


def test_recall_is_counted_by_hand():
    kept = Candidates(
        indices=torch.tensor([1, 4, 5]),
        per_query=[torch.tensor([4]), torch.tensor([5, 1])],
        similarity=[torch.zeros(1), torch.zeros(2)],
        examples=20,
        method="hand",
        settings={},
    )
    sample = torch.tensor([4, 9, 1, 17])
    scores = torch.tensor([[9.0, 1.0], [8.0, 7.0], [7.0, 9.0], [1.0, 8.0]])
    # true top-2: of the first query 4 and 9, of the second 1 and 17
    found = recall(kept, scores, sample, k=2)
    assert found.value == 0.5
    assert found.per_query.tolist() == [0.5, 0.5]
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 4))
    assert found.share == 0.15
    top3 = recall(kept, scores, sample, k=3)  # 4, 9, 1 and 1, 17, 9
    assert top3.per_query.tolist() == pytest.approx([2 / 3, 1 / 3])
    own = recall(kept, scores, sample, k=3, shared=False)
    assert own.per_query.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert own.share == pytest.approx(1.5 / 20)


def test_recall_of_everything_is_one_with_an_interval_that_is_not_empty():
    scores = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    found = recall(uniform(30, 30, queries=2), scores, torch.arange(30), k=5)
    assert (found.value, found.stderr, found.high) == (1.0, 0.0, pytest.approx(1.0))
    assert found.low == pytest.approx(10 / (10 + 1.959964**2))  # Wilson's at 10 of 10


def test_recall_of_chance_is_its_share_within_its_error():
    scores = torch.randn(2000, 40, generator=torch.Generator().manual_seed(1))
    kept = uniform(2000, 600, queries=40, seed=5)
    found = recall(kept, scores, torch.arange(2000), k=25)
    assert found.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 1000), rel=0.05)
    assert abs(found.value - 0.3) < 4 * found.stderr
    assert found.low < 0.3 < found.high


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tfidf("one text", ["a"]), ValueError, "expected a sequence of training documents"),
        (lambda: tfidf([], ["a"]), ValueError, "at least one"),
        (lambda: bm25(["a b"], []), ValueError, "expected a sequence of query documents"),
        (lambda: bm25(["a b"], [[1]]), TypeError, "all as token ids, got both"),
        (lambda: bm25([[1.5]], [[1]]), TypeError, "training document 0 as a text or"),
        (lambda: bm25([[1], 3], [[1]]), TypeError, "training document 1 .* got int"),
        (lambda: bm25(["ab"], ["cd"], ignore=[1]), ValueError, "use stop_words="),
        (lambda: bm25([[1]], [[1]], k1=-1.0), ValueError, "k1 >= 0 and 0 <= b <= 1"),
        (lambda: tfidf([[1]], [[1]], 0), ValueError, "keep= is a number of at least 1, got 0"),
        (lambda: tfidf(["a", "?"], ["b"]), ValueError, "no term that counts"),
        (lambda: tfidf(["ab"], ["b"], ngram_range=(3, 2)), ValueError, "ngram_range"),
        (lambda: uniform(0, 3), ValueError, "examples= is a number of at least 1"),
        (
            lambda: merged(uniform(4, 2), uniform(5, 2)),
            ValueError,
            r"\(examples, queries\) of \[\(4, 1\), \(5, 1\)\]",
        ),
        (
            lambda: recall(uniform(4, 2), torch.zeros(3, 2), torch.arange(3)),
            ValueError,
            r"scores \[n, 1\], got \[3\] and \[3, 2\]",
        ),
        (
            lambda: recall(uniform(4, 2), torch.zeros(3, 1), torch.arange(3)),
            ValueError,
            "k= is 1 to the 3 sampled",
        ),
        (
            lambda: recall(uniform(4, 2), torch.zeros(2, 1), torch.tensor([1, 1]), 1),
            ValueError,
            "every sampled index once",
        ),
        (
            lambda: recall(uniform(4, 2), torch.zeros(2, 1), torch.tensor([1, 7]), 1),
            ValueError,
            "index 7 is sampled, but the filter saw 4",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("method", [tfidf, bm25])
def test_without_scikit_learn_the_line_to_install_is_told(method, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **named):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        method(["a b"], ["a"])
