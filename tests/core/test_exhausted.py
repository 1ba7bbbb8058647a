"""Errors of memory keep their type, and say where, what was asked for, and what takes less."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import curvlib as cl
from curvlib.core.exhausted import is_exhausted, names_what_fits
from curvlib.core.run import run
from curvlib.operators.example_products import example_products

CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
ERRORS = {
    "cpu": lambda: RuntimeError(CPU),
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU"),
    "python": MemoryError,
}
ASKED = {
    "cpu": "which asked for 64 bytes",
    "cuda": "which asked for 20.00 GiB",
    "python": "(MemoryError)",
}


class Greedy(nn.Module):
    """A network whose forward pass runs out of memory after some calls."""

    def __init__(self, error, calls):
        super().__init__()
        self.layer, self.error, self.calls = nn.Linear(6, 3), error, calls

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return self.layer(x)


def risk(kind, calls=3, examples=32):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(examples, 6, generator=draw), torch.arange(examples) % 3
    return cl.Risk(Greedy(ERRORS[kind](), calls), nn.CrossEntropyLoss(), [(x, y)] * 4)


@pytest.mark.parametrize("kind", ERRORS)
def test_an_estimate_says_where_and_what_takes_less(kind):
    own = risk(kind)
    with pytest.raises(type(own.model.error)) as caught:
        cl.eigenpairs(cl.hessian(own), 3, progress=False)
    told = str(caught.value)
    assert told.startswith(
        "out of memory in eigenpairs of Hessian, in a product of Hessian, in batch 3 of a pass "
        "over the data"
    )
    assert ASKED[kind] in told
    for way in ("smaller batches (now 32 examples)", "memory=0", "basis= (now 22) or k="):
        assert way in told
    assert "columns" not in told  # there is one
    assert told.endswith("`curvlib plan` says which values fit")
    assert caught.value.__cause__ is own.model.error


@pytest.mark.parametrize(
    ("call", "ways"),
    [
        (lambda r: cl.hessian(r) @ torch.ones(21, 5), ["fewer columns at a time (now 5)"]),
        (lambda r: r.gradient(), ["smaller batches (now 32 examples)"]),
        (
            lambda r: cl.density(cl.ggn(r), progress=False),
            ["reorthogonalize=False, fewer steps= or fewer probes=", "columns at a time (now 2)"],
        ),
        (
            lambda r: cl.trace(cl.ggn(r), method="xnystrace", max_products=12, progress=False),
            ["block=, now 8", "fewer probes= (now 12), or method='hutchinson'"],
        ),
        (
            lambda r: cl.diagonal(cl.hessian(r), method="hutchinson", progress=False),
            ["block=, now 8"],
        ),
        (lambda r: cl.low_rank(cl.ggn(r), 4, progress=False), ["a lower rank= (now 4)"]),
        (
            lambda r: cl.solve(
                cl.ggn(r), torch.ones(21), damping=1.0, preconditioner=7, progress=False
            ),
            ["a preconditioner= of lower rank (now 7)"],
        ),
        (lambda r: cl.kfac(r, progress=False), ["in K-FAC", "smaller batches (now 32"]),
        (
            lambda r: list(cl.gradient_rows(r, 8)),
            ["smaller batches (now 32", "a time (block=, now"],
        ),
        (lambda r: list(cl.gradients(r, block=5)), ["fewer examples at a time (block=, now 5)"]),
        (
            lambda r: list(example_products(r, block=6)),
            ["in products of examples", "fewer examples at a time (block=, now 6)"],
        ),
        (cl.influence.Influence.of, ["smaller batches (now 32"]),
    ],
)
def test_calls_name_their_own_settings(call, ways):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        call(risk("cuda"))
    for way in ways:
        assert way in str(caught.value)


def test_fallbacks_are_not_taken_for_want_of_memory():
    """The CPU's error is a RuntimeError like many, but no reason for another route."""

    class Heavy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return Second.apply(g)

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g):
            return g.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError(CPU)

    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    data = (torch.eye(2), torch.zeros(2, 2))
    own = cl.Risk(model, lambda out, y: (Heavy.apply(out) - y).square().mean(), data)
    with pytest.raises(RuntimeError, match="^out of memory in a product of Hessian, in batch 0"):
        cl.hessian(own) @ torch.ones(6)


class Once(Greedy):
    """A network that runs out of memory once: whatever goes another way is not stopped by it."""

    def forward(self, x):
        self.calls -= 1
        if self.calls == -1:
            raise self.error
        return self.layer(x)


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize(
    "use",
    [
        lambda r: cl.ggn(r) @ torch.ones(21, 1),
        lambda r: cl.ggn(r) @ torch.ones(21, 2),
        lambda r: list(cl.gradients(r, block=4)),
        lambda r: list(example_products(r, block=4)),
    ],
)
def test_want_of_memory_is_not_taken_for_want_of_derivatives(use, calls):
    x, y = torch.ones(8, 6), torch.arange(8) % 3
    model = Once(RuntimeError(CPU), calls)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    with pytest.raises(RuntimeError, match="^out of memory in "):
        use(cl.Risk(model, nn.CrossEntropyLoss(), data))


def test_other_errors_and_own_refusals_pass_as_they_are():
    def fail(error):
        with names_what_fits("x", {"rank": 3}):
            raise error

    for error in (
        RuntimeError("shape mismatch"),
        ValueError("out of memory"),
        MemoryError("a window needs 3 GB, but cpu has 1 GB; what would fit: size=3"),
    ):
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert caught.value is error


def test_contexts_add_up_and_do_not_repeat():
    def nested():
        with (
            names_what_fits("outer", {"rank": 5, "block": 1}),
            names_what_fits("inner", lambda: {"rank": 5}),
            names_what_fits(lambda: "inner", {}),
        ):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        nested()
    assert str(caught.value) == (
        "out of memory in outer, in inner (full). To make it fit: a lower rank= (now 5). "
        "`curvlib plan` says which values fit"
    )
    assert str(caught.value.__cause__) == "full"


def test_without_settings_parameters_are_fewer():
    with (
        pytest.raises(MemoryError, match=r"To make it fit: fewer parameters \(params= of the risk"),
        names_what_fits("x", {}),
    ):
        raise MemoryError


def test_errors_of_numpy():
    with pytest.raises(MemoryError, match="in x, which asked for .* a lower rank"):  # noqa: SIM117
        with names_what_fits("x", {"rank": 9}):
            np.empty((2**45, 2**10))


def test_what_is_exhausted():
    assert all(is_exhausted(make()) for make in ERRORS.values())
    assert is_exhausted(RuntimeError("CUDA error: out of memory"))
    assert is_exhausted(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert is_exhausted(RuntimeError("[x] . DefaultCPUAllocator: not enough memory: you tried to"))
    quoted = "rank 1 of 2 failed in a pass over its data: RuntimeError: out of memory in batch 3"
    assert not is_exhausted(RuntimeError(quoted))
    assert not is_exhausted(RuntimeError("cannot be differentiated"))
    assert not is_exhausted(KeyboardInterrupt())


@dataclass(frozen=True)
class Count:
    value: int


def test_a_run_is_saved_before_it_tells(tmp_path):
    """The steps before are not lost, and the run goes on from them."""
    made = []

    def step(state):
        made.append(state.value)
        if len(made) == 3:
            raise MemoryError
        return Count(state.value + 1)

    def count():
        return run(
            lambda: Count(0),
            step,
            state_type=Count,
            done=lambda state: state.value == 4,
            report=lambda state: (state.value, 4, ""),
            title="count",
            settings={"rank": 8},
            checkpoint=tmp_path / "count.safetensors",
            progress=False,
        )

    with pytest.raises(MemoryError, match=r"^out of memory in count .*a lower rank= \(now 8\)"):
        count()
    assert count().value == 4
    assert made == [0, 1, 2, 2, 3]


LIMITED = """
import resource, torch
import curvlib as cl

P = 2_000_000
op = cl.LinearOperator(lambda V: 2 * V, (P, P), dtype=torch.float64, symmetric=True, psd=True)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, -1))
try:
    cl.eigenpairs(op, 20, progress=False)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's here")
def test_the_allocator_itself():
    """A basis of 60 vectors of 16 MB where 300 MB are left."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith(
        f"out of memory in eigenpairs of operator, which asked for {60 * 2_000_000 * 8} bytes. "
        "To make it fit: a smaller basis= (now 60) or k="
    )
