"""What an optimizer counts: steps, and apart from them the steps that took curvature in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """What an optimizer has done so far; skipped steps do not count.

    Attributes:
        steps: Steps taken.
        curvature_updates: Steps that took curvature in.
        age: Steps since curvature was last taken in, counting that one; ``None`` before the first
            time, and after a parameter group was added.

    Example:
        >>> clock = Clock().ticked(curvature=True).ticked(curvature=False)
        >>> clock.steps, clock.curvature_updates, clock.due(2), clock.due(3)
        (2, 1, True, False)
    """

    steps: int = 0
    curvature_updates: int = 0
    age: int | None = None

    def due(self, interval: int) -> bool:
        """Whether a step that takes curvature in every ``interval`` steps does so next."""
        return self.age is None or self.age >= interval

    def ticked(self, curvature: bool) -> Clock:
        """The clock after a step."""
        age = 1 if curvature else None if self.age is None else self.age + 1
        return Clock(self.steps + 1, self.curvature_updates + curvature, age)
