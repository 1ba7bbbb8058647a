r"""What a computation takes, before it starts: work, memory and traffic of each phase and rank.

A part of curvlib states its formulas in its docstring and gives :class:`Phase` s; a :class:`Plan`
adds them up. Numbers are those of one rank, the busiest. With :math:`R` ranks, :math:`n` bytes
that every rank holds, or that all hold together, a rank sends (and receives as much)

==================================  ==============================
all-reduce (ring)                   :math:`2 \frac{R - 1}{R} n`
all-gather, reduce-scatter (ring)   :math:`\frac{R - 1}{R} n`
==================================  ==============================

Data parallel: every rank has all vectors and a share of the batches, and each sum over the data
is all-reduced once. Sharded: a rank holds the :math:`R`-th part of parameters and of all that is
as long, parameters are gathered layer by layer and gradients reduce-scattered (FSDP2), and inner
products are all-reduced, a few numbers each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from curvlib.core.result import Result


@dataclass(frozen=True)
class Ranks:
    """How processes share the work.

    Attributes:
        count: ``R``.
        sharded: Whether parameters, and vectors as long, are divided among them.

    Raises:
        ValueError: If there is no rank.

    Example:
        >>> Ranks(4).all_reduce(1000), Ranks(4).gather(1000), Ranks(4, sharded=True).held(1000)
        (1500.0, 750.0, 250.0)
    """

    count: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"ranks= is a number of at least 1, got {self.count!r}")

    @property
    def holders(self) -> int:
        """Over how many ranks vectors are divided."""
        return self.count if self.sharded else 1

    def all_reduce(self, size: float) -> float:
        """Bytes that a rank sends to sum ``size`` bytes over the ranks."""
        return 2.0 * self.gather(size)

    def gather(self, size: float) -> float:
        """Bytes that a rank sends to gather, or to reduce and scatter, ``size`` bytes."""
        return (self.count - 1) / self.count * size

    def held(self, size: float) -> float:
        """Bytes that a rank holds of what is as long as the parameters."""
        return size / self.count if self.sharded else float(size)

    def most(self, units: int) -> int:
        """How many of ``units`` that cannot be split (examples, say) the busiest rank has."""
        return -(-units // self.count)

    def share(self, units: int) -> float:
        """Its share of them."""
        return self.most(units) / units


@dataclass(frozen=True)
class Phase:
    """A phase of a computation, on one rank.

    Attributes:
        name: What is done.
        flops: Floating-point operations.
        kept: Bytes that it leaves in memory.
        working: Bytes that it needs besides, at most.
        traffic: Bytes that the rank sends.
    """

    name: str
    flops: float
    kept: float = 0.0
    working: float = 0.0
    traffic: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Result):
    """Work, memory and traffic of each phase; prints as a table.

    Attributes:
        phases: Names of the phases, in order.
        flops: Floating-point operations of each, on a rank.
        kept: Bytes that each leaves in memory.
        working: Bytes that each needs besides, about.
        settings: What it was made for.
        traffic: Bytes that a rank sends in each; none in one process.
        ranks: ``R``.
        sharded: Whether parameters and vectors are divided among the ranks.
        notes: What the numbers rest on.

    Example:
        >>> Plan.of([Phase("fit", 4e9, kept=1e6), Phase("scan", 1e9, working=3e6)], Ranks())
        Plan
          phase                work       keeps    works in
          fit                4 GFLOP        1 MB         0 B
          scan               1 GFLOP         0 B        3 MB
          all                5 GFLOP        peak        4 MB
    """

    phases: tuple[str, ...]
    flops: tuple[float, ...]
    kept: tuple[float, ...]
    working: tuple[float, ...]
    settings: dict[str, Any]
    traffic: tuple[float, ...] = ()
    ranks: int = 1
    sharded: bool = False
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        phases: Iterable[Phase],
        ranks: Ranks,
        settings: Mapping[str, Any] | None = None,
        notes: Iterable[str] = (),
    ) -> Plan:
        """The plan of some phases, one after the other."""
        found = tuple(phases)
        return cls(
            phases=tuple(phase.name for phase in found),
            flops=tuple(float(phase.flops) for phase in found),
            kept=tuple(float(phase.kept) for phase in found),
            working=tuple(float(phase.working) for phase in found),
            settings=dict(settings or {}),
            traffic=tuple(float(phase.traffic) for phase in found),
            ranks=ranks.count,
            sharded=ranks.sharded,
            notes=tuple(notes),
        )

    @property
    def total(self) -> float:
        """Floating-point operations of all phases, on a rank."""
        return sum(self.flops)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in all phases."""
        return sum(self.traffic)

    @property
    def peak(self) -> float:
        """Bytes that are held at once, at most, beside the model."""
        held, most = 0.0, 0.0
        for kept, working in zip(self.kept, self.working, strict=True):
            held += kept
            most = max(most, held + working)
        return most

    def seconds(self, flops_per_second: float, bytes_per_second: float | None = None) -> float:
        """How long it takes at rates that machine and network reach, at least.

        Args:
            flops_per_second: Of a rank.
            bytes_per_second: That a rank sends; traffic is free when omitted.
        """
        sent = 0.0 if bytes_per_second is None else self.sent / bytes_per_second
        return self.total / flops_per_second + sent

    def __repr__(self) -> str:
        traffic = self.traffic or (0.0,) * len(self.phases)
        columns = (self.kept, self.working, traffic)
        rows = [["phase", "work", "keeps", "works in", "sends"]]
        for i, (name, flops) in enumerate(zip(self.phases, self.flops, strict=True)):
            sizes = (readable(column[i], "B") for column in columns)
            rows.append([name, readable(flops, "FLOP"), *sizes])
        sent = readable(self.sent, "B")
        rows.append(["all", readable(self.total, "FLOP"), "peak", readable(self.peak, "B"), sent])
        lines = [f"  {row[0]:<13}" + "".join(f"{x:>12}" for x in row[1:4]) for row in rows]
        if self.ranks == 1:
            return "\n".join(["Plan", *lines, *(f"  {note}" for note in self.notes)])
        lines = [f"{line}{row[4]:>12}" for line, row in zip(lines, rows, strict=True)]
        how = "sharded" if self.sharded else "data parallel"
        head = f"Plan of each of {self.ranks} ranks ({how})"
        return "\n".join([head, *lines, *(f"  {note}" for note in self.notes)])


def fitting(
    make: Callable[..., Plan], settings: Mapping[str, Any], available: float
) -> dict[str, Any]:
    """What one may change, one setting at a time, so that a plan fits.

    Args:
        make: Makes a plan, given some settings in the place of its own.
        settings: By name the present value of a number, of which the largest smaller one that
            fits is looked for, or other values to try in order.
        available: Bytes that there are.

    Returns:
        By name the value that fits, of those where there is one.

    Example:
        >>> def make(rows=8, dtype=4):
        ...     return Plan.of([Phase("window", 0.0, kept=100.0 * rows * dtype)], Ranks())
        >>> fitting(make, {"rows": 8, "dtype": (2,)}, available=2000)
        {'rows': 5, 'dtype': 2}
    """
    found = {}
    for name, value in settings.items():
        if not isinstance(value, int):
            fits = [v for v in value if make(**{name: v}).peak <= available]
            found.update({name: fits[0]} if fits else {})
        elif value > 1 and make(**{name: 1}).peak <= available:
            low, high = 1, value
            while high - low > 1:
                middle = (low + high) // 2
                fits_middle = make(**{name: middle}).peak <= available
                low, high = (middle, high) if fits_middle else (low, middle)
            found[name] = low
    return found


def readable(value: float, unit: str) -> str:
    """A number with three digits and a decimal prefix.

    Example:
        >>> readable(1234567.0, "B")
        '1.23 MB'
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000.0
    return f"{value:.3g} {prefix}{unit}"
