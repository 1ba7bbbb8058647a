r"""What products of an operator with columns cost, on one rank.

With :math:`N` examples, of which the busiest of :math:`R` ranks has :math:`N_r = \lceil N / R
\rceil` in :math:`B_r` batches, :math:`v` bytes of a vector and :math:`p` bytes of the parameters,
a product with :math:`K` columns takes

=============  ===================================  ========================================
on one rank    data parallel                        sharded
=============  ===================================  ========================================
work           :math:`\frac{N_r}{N}` of all         the same, without graphs that are kept
memory         :math:`w + (K - 1) w'`               :math:`w - 2 v + 2 \ell + (K - 1)
                                                    (w' - v) + \frac{(K + 1) v}{R}`
graphs         :math:`\min(B_r g, M)`, and          :math:`g`
               :math:`g` while one is not kept
traffic        :math:`2 \frac{R - 1}{R} K v`, and    :math:`B_r \frac{R - 1}{R} (3 p + 2 K v)`,
               a header of 20 numbers               or :math:`B_r \frac{R - 1}{R} K (4 p + 2 v)`
                                                    by finite differences
=============  ===================================  ========================================

with :math:`w` bytes for one column (activations, gradients, and the product), :math:`w'` for each
further one, :math:`g` for a batch's graph within the budget :math:`M`, and :math:`\ell` for the
largest layer. Sharded parameters are gathered for the forward pass, the backward pass and its
derivative (two at a time: the next layer's while one computes); a vector's shards are gathered
once, and those of a product scattered. That assumes that every layer is sharded by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from curvlib.core.plan import Ranks

#: Bytes of the header of a pass: see :mod:`curvlib.core.ranks.group`.
HEADER = 8 * 20
#: Columns that are done at once at most, so that memory for more is that of the vectors alone.
COLUMNS = 16


@dataclass(frozen=True)
class ProductCost:
    """Work and memory of products, on all data in one process.

    Attributes:
        size: ``P``.
        vector: Bytes of a vector.
        parameters: Bytes of the parameters.
        layer: Bytes of the largest layer's parameters.
        total: ``N``.
        examples: Examples of a batch.
        flops: Of a product with one column.
        second: What a second column adds, for which another route may be taken.
        further: Of each further column.
        again: Of a product with one column while all graphs are kept.
        graph: Bytes that a batch's graph keeps between products; 0 where none is kept.
        budget: Bytes that kept graphs may hold.
        working: Bytes that a product with one column needs, its result included.
        pair: Bytes that a second column adds.
        column: Bytes that each further column adds, up to 16 columns; then a vector.
        gathers: How often sharded parameters are gathered for a batch: for a product, and for each
            column besides.
        moves: How often a column's length is gathered or scattered for a batch.
    """

    size: int
    vector: float
    parameters: float
    layer: float
    total: int
    examples: int
    flops: float
    second: float
    further: float
    again: float
    graph: float
    budget: float
    working: float
    pair: float
    column: float
    gathers: tuple[float, float] = (3.0, 0.0)
    moves: float = 2.0

    def on(self, ranks: Ranks, examples: int | None = None) -> ProductCost:
        """The cost with batches of another size, and of no more examples than a rank has."""
        asked = self.examples if examples is None else examples
        return self.with_batches_of(min(asked, ranks.most(self.total)))

    def with_batches_of(self, examples: int) -> ProductCost:
        """The cost with batches of another size: what is not as long as parameters scales.

        Example:
            >>> cost = ProductCost(
            ...     1, 4, 4, 4, 320, 32, 9.0, 6.0, 6.0, 6.0, 0.0, 0.0, 72.0, 4.0, 4.0
            ... )
            >>> half = cost.with_batches_of(16)
            >>> half.batches(Ranks()), half.working, half.flops
            (20, 40.0, 9.0)
        """
        scale = examples / self.examples
        fixed = min(self.working, 2 * self.vector)
        fixed_graph = min(self.graph, self.vector)
        each = {}
        for name in ("pair", "column"):
            size = getattr(self, name)
            own = min(size, self.vector)
            each[name] = own + (size - own) * scale
        return replace(
            self,
            examples=examples,
            working=fixed + (self.working - fixed) * scale,
            graph=fixed_graph + (self.graph - fixed_graph) * scale,
            **each,
        )

    def batches(self, ranks: Ranks) -> int:
        """Batches of the busiest rank."""
        return -(-ranks.most(self.total) // self.examples)

    def kept_batches(self, ranks: Ranks) -> int:
        """How many batches of a rank keep their graphs between products."""
        if self.graph == 0.0 or ranks.sharded:
            return 0
        return min(self.batches(ranks), int(self.budget // self.graph))

    def graphs(self, ranks: Ranks) -> float:
        """Bytes of the graphs that a rank keeps."""
        return self.kept_batches(ranks) * self.graph

    def work(self, ranks: Ranks, calls: float, columns: int = 1, *, warm: bool = False) -> float:
        """Work of products, one after the other, on a rank.

        Args:
            ranks: Who shares it.
            calls: How many block products.
            columns: ``K`` of each.
            warm: Whether graphs were kept by products before.
        """
        saved = (self.flops - self.again) * self.kept_batches(ranks) / self.batches(ranks)
        again = self.flops - saved
        if columns > 1:
            again += self.second + (columns - 2) * self.further
        first = 0.0 if warm or calls == 0 else saved
        return ranks.share(self.total) * (first + calls * again)

    def memory(self, ranks: Ranks, columns: int = 1) -> float:
        """Bytes that a block product needs beside its columns, on a rank, its result included."""
        lasting = self.kept_batches(ranks) == self.batches(ranks)
        one = self.working + (0.0 if lasting else self.graph)
        beyond = max(0, columns - COLUMNS)
        more = 0.0
        if columns > 1:
            more = self.pair + (columns - 2 - beyond) * self.column
        if not ranks.sharded or ranks.count == 1:
            return one + more + beyond * self.vector
        activations = max(0.0, one - 2 * self.vector)
        activations += max(0.0, more - (columns - 1 - beyond) * self.vector)
        return activations + 2 * self.layer + ranks.held((columns + 1) * self.vector)

    def traffic(self, ranks: Ranks, columns: int = 1) -> float:
        """Bytes that a rank sends for a block product."""
        if not ranks.sharded:
            return ranks.all_reduce(columns * self.vector) + (ranks.count - 1) * HEADER
        each = (self.gathers[0] + columns * self.gathers[1]) * self.parameters
        each += self.moves * columns * self.vector
        return self.batches(ranks) * ranks.gather(each)
