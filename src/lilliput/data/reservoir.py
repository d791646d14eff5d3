"""A uniform draw of some things from a stream of unknown length: Vitter's algorithm R (1985), section 2."""

from __future__ import annotations

import random
from typing import Generic, TypeVar

T = TypeVar("T")


class Reservoir(Generic[T]):
    """At most `size` things of a stream, each kept with the same chance, in `kept`; None keeps all.

    The order in `kept` is not the stream's.
    """

    def __init__(self, size: int | None, rng: random.Random) -> None:
        self.size, self.rng, self.seen = size, rng, 0
        self.kept: list[T] = []

    def offer(self, thing: T) -> None:
        """Take one thing of the stream; it is kept with the chance that all have."""
        self.seen += 1
        if self.size is None or len(self.kept) < self.size:
            self.kept.append(thing)
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.kept[place] = thing
