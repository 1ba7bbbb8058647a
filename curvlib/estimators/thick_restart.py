r"""Thick-restart block Lanczos as a state and its steps.

The state holds an orthonormal basis :math:`Q` (rows of one buffer), the block :math:`R` of
orthonormal rows that come next, and the small matrices of the Krylov relation

.. math:: A Q = Q T + R E .

A step multiplies :math:`R` in one block product, and so moves it into :math:`Q`. When the buffer
is full, :math:`Q` is rotated in place to the wanted Ritz vectors and some more, and the relation
stays exact (Wu and Simon, *Thick-restart Lanczos method for large symmetric eigenvalue
problems*, SIAM J. Matrix Anal. Appl. 22, 2000). :math:`T` is the projection as computed, not the
arrow that exact arithmetic predicts. Numbers are in units of a power of two near :math:`\|A\|`,
so that operators of any scale neither underflow nor overflow.

The phases of a run:

``expand``
    Until the residuals :math:`\|E s_i\|` of the wanted Ritz pairs are below the tolerance.
``check``
    From one starting vector, Lanczos sees one vector of each eigenspace. So a *random* vector
    orthogonal to the pairs found is followed, until it would have shown a missed copy (see
    :func:`~curvlib.estimators.lanczos.amplification`). If one shows, the run expands further.
``verify``
    One product for each pair measures its residual: what is returned is measured, not estimated.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from curvlib.estimators import lanczos
from curvlib.estimators.krylov_state import KrylovState, Plan, wanted_first
from curvlib.estimators.rows import largest, norms

#: Tolerance of the residual estimates, as a share of what measured residuals must meet.
SAFETY = 0.5
#: A random vector has less than this over √n in a direction with probability 0.8 times this.
MISS = 1e-2
#: Columns of one block product when residuals are measured.
VERIFY_COLUMNS = 8
#: How often pairs whose measured residual is too large are improved.
RETRIES = 3


def is_done(plan: Plan, state: KrylovState) -> bool:
    """Whether nothing is left to do within the budget."""
    more = state.reason == "budget" and _affordable(plan, state, state.block)
    return state.phase == "done" and not more


def next_state(plan: Plan, state: KrylovState) -> KrylovState:
    """One block product, and what follows from it.

    Raises:
        FloatingPointError: If the product is not finite.
    """
    if state.phase == "verify":
        return _verify(plan, state)
    if state.phase == "done":  # stopped by a budget that has grown since
        state = replace(state, phase="expand", reason="", verified=0)
    state = _expand(plan, state)
    state = _assess_check(plan, state) if state.phase == "check" else _assess(plan, state)
    full = state.size + 2 * state.block > state.rows.shape[0]
    # Rotated now rather than before the next product, which may fail: see curvlib.core.run.
    return _restart(plan, state) if full and state.phase in ("expand", "check") else state


# ------------------------------------------------------------------------ products
def _expand(plan: Plan, state: KrylovState) -> KrylovState:
    """Moves R into Q by one block product, and makes the next R."""
    rows, size, block = state.rows, state.size, state.block
    product = plan.op.matmat(rows[size : size + block].T)
    scale = state.scale
    if scale == 0.0:
        most = largest(product, plan.op.spread)
        if not math.isfinite(most):
            raise _not_finite(plan, state.products, block)
        if most > 0.0:
            scale = lanczos.power_of_two(most, rows.dtype)
    generator = torch.Generator(device=rows.device)
    generator.set_state(state.generator)
    grown = size + block
    slot = rows[grown : grown + block]
    torch.mul(product.T, 1.0 / (scale or 1.0), out=slot)
    del product
    eps = torch.finfo(rows.dtype).eps
    try:
        C, R = lanczos.orthonormalize(
            rows,
            grown,
            block,
            keep=min(block, plan.dimension - grown),
            recent=min(grown - state.locked, 2 * block),
            deflate=plan.deflate,
            floor=10 * eps * max(state.norm, eps),
            generator=generator,
            spread=plan.op.spread,
        )
    except FloatingPointError as error:
        raise _not_finite(plan, state.products, block) from error
    T = torch.zeros((grown, grown), dtype=torch.float64)
    T[:size, :size] = state.T
    T[:, size:] = C
    T[size:, :] = C.T
    T[size:, size:] = 0.5 * (C[size:] + C[size:].T)
    E = torch.zeros((R.shape[0], grown), dtype=torch.float64)
    E[:, size:] = R
    return replace(
        state,
        T=T,
        E=E,
        dropped=torch.cat([state.dropped, torch.zeros(block, dtype=torch.float64)]),
        size=grown,
        block=R.shape[0],
        scale=scale,
        norm=max(state.norm, plan.deflated_norm / scale if scale else 0.0),
        products=state.products + block,
        checked=state.checked + (block if state.phase == "check" else 0),
        generator=generator.get_state(),
    )


def _not_finite(plan: Plan, products: int, block: int) -> FloatingPointError:
    step = f"product {products + 1}" + (f" to {products + block}" if block > 1 else "")
    return FloatingPointError(
        f"{step} of {plan.op!r} has entries that are NaN or infinite, though its vectors are "
        "finite; check the loss and its derivatives at these parameters (risk.check()). "
        "With checkpoint=, what came before is saved"
    )


# ---------------------------------------------------------------------- decisions
def _affordable(plan: Plan, state: KrylovState, block: int) -> bool:
    """Whether the budget has room for a block, and for measuring the residuals after it."""
    return state.products + block + plan.k <= plan.budget


def _assess(plan: Plan, state: KrylovState) -> KrylovState:
    """Whether the wanted pairs have converged, and what follows."""
    k, size, block = plan.k, state.size, state.block
    affordable = _affordable(plan, state, block)
    full = size + 2 * block > state.rows.shape[0]
    due = size // max(block, 1) % (1 + size // 32) == 0
    if size < k or (affordable and block and not (due or full)):
        return state
    theta, S = torch.linalg.eigh(state.T)
    best = wanted_first(theta, plan.which)[:k]
    coupled = torch.linalg.vector_norm(state.E @ S[:, best], dim=0)
    left_out = (state.dropped[:, None] * S[:, best]).square().sum(0)
    state = replace(
        state,
        norm=max(state.norm, float(theta.abs().max())),
        values=theta[best],
        residuals=(coupled.square() + left_out).sqrt(),
    )
    # Below the machine epsilon, estimates are noise, and waiting for them takes forever.
    eps = torch.finfo(state.rows.dtype).eps
    aim = max(SAFETY * plan.tolerance / (1 + state.retries), eps) * state.norm
    if block and affordable and not bool((coupled <= aim).all()):
        return state
    converged = block == 0 or bool((coupled <= aim).all())
    state = _rotated(state, S[:, best], theta[best])
    if not converged:
        return replace(state, phase="verify", reason="budget", verified=0)
    if block == 0 or not _needs_check(plan, state):
        return _to_verify(state)
    generator = torch.Generator(device=state.rows.device)
    generator.set_state(state.generator)
    lanczos.random_row(state.rows, k, plan.deflate, generator, plan.op.spread)
    return replace(
        state,
        E=torch.zeros((1, k), dtype=torch.float64),
        dropped=state.residuals,
        block=1,
        locked=k,
        phase="check",
        checked=0,
        generator=generator.get_state(),
    )


def _needs_check(plan: Plan, state: KrylovState) -> bool:
    """Whether a copy can have been missed.

    From ``b`` random vectors, Lanczos finds ``min(b, multiplicity)`` vectors of each
    eigenspace: where it has found fewer than ``b`` of each, it has found all.
    """
    if not plan.check or not _affordable(plan, state, 1):
        return False
    if plan.warm or plan.which == "LM":  # Ritz values within can still grow past those found
        return True
    if plan.k == 1:
        return False
    ordered = state.values.sort().values
    near = ordered.diff() <= 10 * plan.tolerance * state.norm
    copies = longest = 1
    for same in near.tolist():
        copies = copies + 1 if same else 1
        longest = max(longest, copies)
    return longest >= plan.block


def _assess_check(plan: Plan, state: KrylovState) -> KrylovState:
    """Whether the random vector has shown a missed copy, or would have by now."""
    k, length = plan.k, state.size - state.locked
    T, E = state.T[k:, k:], state.E[:, k:]
    theta, S = torch.linalg.eigh(T)
    state = replace(state, norm=max(state.norm, float(theta.abs().max())))
    slack = plan.tolerance * state.norm
    low, high = _missed_outside(state.values, plan.which)
    if float(theta[-1]) > high + slack or float(theta[0]) < low - slack:
        return _assess(plan, replace(state, phase="expand", locked=0))
    if state.block and _affordable(plan, state, 1):
        ends = [(0, low - slack), (-1, high + slack)]
        ends = [(i, at) for i, at in ends if math.isfinite(at)]
        estimates = torch.linalg.vector_norm(E @ S, dim=0)
        settled = all(float(estimates[i]) <= slack for i, _ in ends)
        enough = (plan.dimension - k) / MISS**2
        if state.checked == length:  # not restarted: one Lanczos recurrence
            betas = torch.cat([T.diagonal(1), E[:, -1]])
            seen = [lanczos.amplification(T.diagonal(), betas, at) for _, at in ends]
            settled = settled or min(seen) >= enough
        if not settled and state.checked < _patience(plan, state):
            return state
    return _to_verify(replace(state, T=state.T[:k, :k], dropped=state.dropped[:k], size=k, block=0))


def _missed_outside(values: Tensor, which: str) -> tuple[float, float]:
    """The interval outside of which an eigenvalue would be among the wanted ones."""
    if which == "LA":
        return -math.inf, float(values.min())
    if which == "SA":
        return float(values.max()), math.inf
    if which == "LM":
        least = float(values.abs().min())
        return -least, least
    low = float(values[1::2].max()) if values.numel() > 1 else -math.inf
    return low, float(values[::2].min())


def _to_verify(state: KrylovState) -> KrylovState:
    nothing = torch.zeros((0, state.size), dtype=torch.float64)
    return replace(state, E=nothing, block=0, locked=0, phase="verify", verified=0)


# ----------------------------------------------------------------------- restarts
def _rotated(state: KrylovState, S: Tensor, theta: Tensor) -> KrylovState:
    """Q after ``locked`` rotated by S to Ritz vectors, in place, with R behind them."""
    locked, kept = state.locked, S.shape[1]
    lanczos.rotate(state.rows, locked, state.size, S)
    lanczos.move_rows(state.rows, state.size, locked + kept, state.block)
    T = torch.zeros((locked + kept, locked + kept), dtype=torch.float64)
    T[:locked, :locked] = state.T[:locked, :locked]
    T[:locked, locked:] = state.T[:locked, locked:] @ S
    T[locked:, :locked] = T[:locked, locked:].T
    T[locked:, locked:] = theta.diag()
    left_out = (state.dropped[locked:, None] * S).square().sum(0).sqrt()
    return replace(
        state,
        T=T,
        E=torch.cat([state.E[:, :locked], state.E[:, locked:] @ S], dim=1),
        dropped=torch.cat([state.dropped[:locked], left_out]),
        size=locked + kept,
    )


def _restart(plan: Plan, state: KrylovState) -> KrylovState:
    """Makes room in a full buffer: keeps the wanted Ritz vectors and half of the others."""
    length = state.size - state.locked
    wanted = 1 if state.phase == "check" else plan.k
    room = state.rows.shape[0] - state.locked - 2 * state.block
    keep = min(wanted + (length - wanted) // 2, room)
    theta, S = torch.linalg.eigh(state.T[state.locked :, state.locked :])
    which = _end_looked_at(plan, state) if state.phase == "check" else plan.which
    best = wanted_first(theta, which)[:keep]
    return _rotated(state, S[:, best], theta[best])


def _end_looked_at(plan: Plan, state: KrylovState) -> str:
    """Where a check looks for missed copies: of two ends one after the other.

    In a small buffer a few vectors are kept, perhaps one: they go to the end that they are near,
    where there may be nothing wanted, and the other one is never seen.
    """
    if plan.which in ("LA", "SA"):
        return plan.which
    return "LA" if 2 * state.checked < _patience(plan, state) else "SA"


def _patience(plan: Plan, state: KrylovState) -> int:
    """Products of a check, at most."""
    ends = 1 if plan.which in ("LA", "SA") else 2
    return max(10 * ends, state.products - state.checked)


# ------------------------------------------------------------------- measurements
def _verify(plan: Plan, state: KrylovState) -> KrylovState:
    """Measures some residuals by one block product; keeps the largest one's vector behind R."""
    rows, first = state.rows, state.verified
    last = min(plan.k, first + VERIFY_COLUMNS)
    product = plan.op.matmat(rows[first:last].T)
    spare = state.size + state.block
    residuals = state.residuals.clone()
    most = float(residuals[:first].max()) if first else -1.0
    for i in range(first, last):
        residual = product[:, i - first] * (1.0 / (state.scale or 1.0))
        residual.sub_(rows[i], alpha=float(state.values[i]))
        if plan.deflate is not None:
            lanczos.project_out(plan.deflate, residual[None], plan.op.spread)
        residuals[i] = float(norms(residual[None], plan.op.spread))
        if not math.isfinite(float(residuals[i])):
            raise _not_finite(plan, state.products, last - first)
        if float(residuals[i]) > most:
            most = float(residuals[i])
            rows[spare].copy_(residual)
    state = replace(
        state, products=state.products + last - first, residuals=residuals, verified=last
    )
    return state if last < plan.k else _conclude(plan, state)


def _conclude(plan: Plan, state: KrylovState) -> KrylovState:
    """Ends the run, or improves the worst pair by expanding along its residual."""
    worst = float(state.residuals.max())
    if worst <= plan.tolerance * state.norm:
        return replace(state, phase="done", reason="converged")
    if state.reason == "budget" or not _affordable(plan, state, 1):
        return replace(state, phase="done", reason="budget")
    stuck = state.retries == RETRIES or worst > 0.5 * state.worst
    if stuck or plan.dimension == plan.k:
        return replace(state, phase="done", reason="precision")
    k, rows = plan.k, state.rows
    if state.size + state.block > k:
        rows[k].copy_(rows[state.size + state.block])
    generator = torch.Generator(device=rows.device)
    generator.set_state(state.generator)
    lanczos.orthonormalize(
        rows,
        k,
        1,
        keep=1,
        recent=0,
        deflate=plan.deflate,
        floor=0.0,
        generator=generator,
        spread=plan.op.spread,
    )
    E = torch.zeros((1, k), dtype=torch.float64)
    dropped = state.residuals.clone()
    at = int(state.residuals.argmax())
    E[0, at], dropped[at] = worst, 0.0
    return replace(
        state,
        T=state.values.diag(),
        E=E,
        dropped=dropped,
        size=k,
        block=1,
        phase="expand",
        retries=state.retries + 1,
        worst=worst,
        verified=0,
        generator=generator.get_state(),
    )
