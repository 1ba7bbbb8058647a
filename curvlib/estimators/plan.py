r"""Phases of estimates before they run: see :mod:`curvlib.core.plan`.

With vectors of :math:`v` bytes (sharded: :math:`v / R` on a rank), products as in
:mod:`curvlib.core.product_cost`, and the part of the work and memory that is not the products':

=============  =================================  ============================================
phase          work besides products              memory besides products
=============  =================================  ============================================
eigenpairs     :math:`8 P m n`, n products, and   :math:`m v`, the basis of
               :math:`P m^2` for each restart     :math:`m = 2 k + 16 + 4 b` vectors; keeps
                                                  :math:`k v`
density        :math:`4 P p s (s + 2 k)`          :math:`s p v` (up to 256 MiB), else
                                                  :math:`3 p v`; two vectors
trace          :math:`8 P m^2` of sketches        :math:`(2 m + b) v` (xtrace), :math:`2 m v`
                                                  (xnystrace), :math:`(m + b) v` (hutch++),
                                                  :math:`b v` (hutchinson)
diagonal       :math:`8 P m^2` of sketches        :math:`3 m v` (xdiag), :math:`2 m v`
                                                  (xnysdiag), :math:`(b + 1) v`
                                                  (hutchinson); keeps :math:`2 v`
solve          :math:`12 P K` an iteration        :math:`c K v`: see :data:`SOLVE_BLOCKS`
=============  =================================  ============================================

Against all tensors that are really made, memory is right to 7 % (``tests/test_planning.py``).
Krylov vectors of data-parallel ranks are the same on all, and so is the work on them. Sharded
ranks share it, and all-reduce coefficients: :math:`3 m` numbers for each vector of a basis, a few
for each column of a solver, :data:`SKETCH_SUMS` times :math:`m^2` for a sketch of :math:`m` probes,
and for block means of a diagonal the sum over each cell (:mod:`curvlib.estimators.cells`) for each
probe.
"""

from __future__ import annotations

from curvlib.core.operator import LinearOperator
from curvlib.core.plan import Phase, Ranks
from curvlib.core.product_cost import ProductCost
from curvlib.core.space import ParamSpace
from curvlib.estimators import diagonal, thick_restart, trace
from curvlib.estimators.cells import cell_shape
from curvlib.estimators.density import BASIS_BYTES
from curvlib.estimators.eigenpairs import buffer_size
from curvlib.estimators.lanczos import SCRATCH_BYTES
from curvlib.estimators.rows import chunk_length
from curvlib.estimators.solve_state import PERIOD
from curvlib.estimators.stopping import DEFAULT_PRODUCTS, whole

#: Probes that advance together in :func:`curvlib.trace` and :func:`curvlib.diagonal`.
BLOCK = 8
#: Points of the grid in :func:`curvlib.density`.
POINTS = 1024
#: Blocks as large as the right-hand sides that a solver holds beside a product: the right-hand
#: sides in units of their norms, the solutions, and what an iteration remembers and makes; and with
#: what it remembers twice, when true residuals are measured on the way.
SOLVE_BLOCKS = {"cg": (7, 11), "minres": (9, 16), "neumann": (5, 9)}

#: Inner products that sharded ranks add up for a sketch of m probes, by m^2: the basis is read
#: against its next block three times, against products and against probes.
SKETCH_SUMS = {"xtrace": 2.5, "xdiag": 2.5, "hutch++": 3.0, "xnystrace": 3.0, "xnysdiag": 2.0}


def graphs_phase(cost: ProductCost, ranks: Ranks) -> Phase:
    """Graphs that products build once, and keep."""
    once = cost.work(ranks, 1) - cost.work(ranks, 1, warm=True)
    return Phase("graphs", once, kept=cost.graphs(ranks))


def eigenpairs_phase(
    op: LinearOperator,
    cost: ProductCost,
    ranks: Ranks,
    *,
    k: int = 6,
    basis: int | None = None,
    block: int = 1,
    products: int | None = None,
) -> Phase:
    """Eigenpairs by thick-restart Lanczos: see :func:`curvlib.eigenpairs`.

    How many products it takes depends on the spectrum: when ``products`` is omitted, as many as
    fill the basis once, and ``k`` for the residuals.

    Example:
        >>> import torch
        >>> op = LinearOperator(lambda V: V, (1000, 1000), dtype=torch.float32, symmetric=True)
        >>> none = ProductCost(1000, 4000, 4000, 4000, 1, 1, *9 * [0.0])
        >>> eigenpairs_phase(op, none, Ranks(), k=10).kept / 4000
        10.0
    """
    n, vector = op.shape[0], ranks.held(cost.vector)
    k = min(whole("k", k), n)
    m = buffer_size(k, whole("block", block), n, basis)
    count = m + k if products is None else whole("products", products)
    wide = min(k, thick_restart.VERIFY_COLUMNS)
    work = cost.work(ranks, max(0, count - k) / block, block, warm=True)
    work += cost.work(ranks, k / wide, wide, warm=True)
    restarts = max(0.0, (count - k - m) / (m / 2))
    own = 8.0 * n * m * count + restarts * n * m**2
    product = max(cost.memory(ranks, block), cost.memory(ranks, wide))
    scratch = min(1.25 * SCRATCH_BYTES, 12.0 * m * vector / op.dtype.itemsize)
    coefficients = ranks.all_reduce(3 * m * op.dtype.itemsize) if ranks.sharded else 0.0
    traffic = max(0, count - k) / block * cost.traffic(ranks, block)
    return Phase(
        "eigenpairs",
        work + _divided(own, ranks),
        kept=k * vector,
        # the pairs are copied when nothing is multiplied or rotated any more
        working=m * vector + max(k * vector, product + 2 * vector, scratch) - k * vector,
        traffic=traffic + k / wide * cost.traffic(ranks, wide) + count * coefficients,
    )


def density_phase(
    op: LinearOperator,
    cost: ProductCost,
    ranks: Ranks,
    *,
    steps: int = 64,
    probes: int = 2,
    deflated: int = 0,
) -> Phase:
    """The spectral density by Lanczos quadrature: see :func:`curvlib.density`."""
    n, vector = op.shape[0], ranks.held(cost.vector)
    length = min(whole("steps", steps), n - min(deflated, n - 1))
    slots = length if length * whole("probes", probes) * cost.vector <= BASIS_BYTES else 3
    own = 4.0 * n * probes * length * (min(slots, length) + 2 * deflated)
    smooth = 3.0 * 8.0 * POINTS * probes * length  # each node's kernel on the grid
    coefficients = ranks.all_reduce(3 * slots * op.dtype.itemsize) if ranks.sharded else 0.0
    return Phase(
        "density",
        cost.work(ranks, length, probes, warm=True) + _divided(own, ranks),
        working=slots * probes * vector + max(cost.memory(ranks, probes) + 2 * vector, smooth),
        traffic=length * (cost.traffic(ranks, probes) + probes * coefficients),
    )


def trace_phase(
    op: LinearOperator,
    cost: ProductCost,
    ranks: Ranks,
    *,
    method: str | None = None,
    products: int | None = None,
    tolerance: float | None = None,
    block: int = BLOCK,
) -> Phase:
    """A trace by random probes, with its whole budget: see :func:`curvlib.trace`."""
    budget = _budget(products, tolerance)
    chosen = trace.choose(op, method, budget, tolerance, ranks.holders)
    copies = {"xtrace": 2.0, "xnystrace": 2.0, "hutch++": 1.0}.get(chosen, 0.0)
    return _sampled(op, cost, ranks, "trace", chosen, budget, block, copies, trace.METHODS)


def diagonal_phase(
    op: LinearOperator,
    cost: ProductCost,
    ranks: Ranks,
    *,
    method: str | None = None,
    products: int | None = None,
    tolerance: float | None = None,
    block: int = BLOCK,
) -> Phase:
    """A diagonal by random probes, with its whole budget: see :func:`curvlib.diagonal`."""
    budget = _budget(products, tolerance)
    chosen = diagonal.choose(op, method, budget, tolerance, ranks.holders)
    copies = {"xdiag": 3.0, "xnysdiag": 2.0}.get(chosen, 0.0)
    return _sampled(op, cost, ranks, "diagonal", chosen, budget, block, copies, diagonal.METHODS)


def solve_phase(
    op: LinearOperator,
    cost: ProductCost,
    ranks: Ranks,
    *,
    columns: int = 1,
    method: str | None = None,
    iterations: int = 100,
) -> Phase:
    """Linear systems without preconditioner: see :func:`curvlib.solve`.

    How many iterations it takes depends on spectrum and damping.

    Raises:
        ValueError: If the method is none of the iterative ones.
    """
    chosen = method or ("cg" if op.psd else "minres")
    if chosen not in SOLVE_BLOCKS:
        names = ", ".join(map(repr, SOLVE_BLOCKS))
        raise ValueError(f"method= is one of {names}, got {chosen!r}")
    rows = whole("columns", columns) * ranks.held(cost.vector)
    blocks = SOLVE_BLOCKS[chosen][whole("iterations", iterations) > PERIOD]
    count = iterations + 1  # one measures the residuals
    sums = ranks.all_reduce(4 * columns * 8) if ranks.sharded else 0.0
    return Phase(
        "solve",
        cost.work(ranks, count, columns, warm=True)
        + _divided(12.0 * op.shape[0] * columns * count, ranks),
        kept=rows,
        working=(blocks - 1) * rows + cost.memory(ranks, columns),
        traffic=count * (cost.traffic(ranks, columns) + sums),
    )


def _sampled(
    op: LinearOperator,
    cost: ProductCost,
    ranks: Ranks,
    name: str,
    method: str,
    budget: int,
    block: int,
    copies: float,
    methods: dict[str, int],
) -> Phase:
    """A phase of probes, of which sketches keep some blocks."""
    n, vector = op.shape[0], ranks.held(cost.vector)
    if method == "exact":
        budget = n
    elif method != "hutchinson":
        budget = min(budget, n - 1)
    probes = max(1, budget // methods.get(method, 1))
    wide = min(whole("block", block), probes)
    calls = budget / wide
    held = copies * probes + (0 if method in ("xdiag", "xnysdiag", "xnystrace") else wide)
    entries = min(chunk_length(op.device), n)  # of each vector at a time, in float64
    each = {"xnystrace": 24.0 * probes, "xnysdiag": 16.0 * probes}
    chunk = entries * each.get(method, 10.0 * (probes + wide)) if copies else 0.0
    own = 8.0 * n * probes**2 if copies else 4.0 * n * budget
    kept = 2.0 * vector if name == "diagonal" else 0.0
    more = vector if kept and method == "hutchinson" else 0.0
    numbers = SKETCH_SUMS.get(method, 0.0) * probes**2 + budget
    if kept and op.space is not None:
        numbers += (budget if method == "hutchinson" else 3 * probes) * _cells(op.space)
    sums = ranks.all_reduce(8 * numbers) if ranks.sharded else 0.0
    return Phase(
        f"{name}",
        cost.work(ranks, calls, wide, warm=True) + _divided(own, ranks),
        kept=kept,
        working=held * vector + more + max(cost.memory(ranks, wide), chunk),
        traffic=calls * cost.traffic(ranks, wide) + sums,
    )


def _cells(space: ParamSpace) -> int:
    """Cells of the parameters of a space, of which block means are made."""
    shapes = space.shapes
    if space.spread is not None:
        shapes = tuple(part.shape for part in space.spread.slices)
    return sum(cell_shape(shape)[0] for shape in shapes)


def _budget(products: int | None, tolerance: float | None) -> int:
    if products is not None:
        return whole("products", products)
    return DEFAULT_PRODUCTS[0 if tolerance is None else 1]


def _divided(work: float, ranks: Ranks) -> float:
    """Work on vectors: that of all ranks alike, unless each has its part of them."""
    return work / ranks.count if ranks.sharded else work
