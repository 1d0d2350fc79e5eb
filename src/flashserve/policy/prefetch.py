"""Which adapters to bring near before they are asked for: the most seconds saved per byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter. p_arrival: of a request within the horizon; saved_s: what a request that finds
    its bytes near saves.
    """

    name: str
    size_bytes: int
    p_arrival: float
    saved_s: float = 1.0

    @property
    def worth_per_byte(self) -> float:
        """Seconds saved, as expected, per byte that it takes."""
        return self.p_arrival * self.saved_s / max(self.size_bytes, 1)


def choose(candidates: Iterable[Candidate], budget_bytes: int, least_p: float) -> list[str]:
    """The names to bring near, the most worth per byte first, within the budget.

    Those less likely than `least_p` are left out, whatever room there is: bytes that come for
    nothing take bandwidth from those that are waited for. One that does not fit any more is passed
    over for smaller ones. Equal worth goes by name, so that one state gives one answer.
    """
    likely = [each for each in candidates if each.p_arrival >= least_p]
    likely.sort(key=lambda each: (-each.worth_per_byte, each.name))
    chosen, free_bytes = [], budget_bytes
    for each in likely:
        if each.size_bytes <= free_bytes:
            free_bytes -= each.size_bytes
            chosen.append(each.name)
    return chosen
