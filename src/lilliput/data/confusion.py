"""Predicted against true classes: the table of counts, and accuracy, macro F1 and the majority class read off it.

true \\ predicted   neg  pos
neg                  40    4        accuracy 0.90 = (40 + 41) / 90
pos                   5   41        majority 0.51 = 46 / 90, what always saying "pos" would get
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Confusion:
    """How often each class was taken for each.

    Attributes:
        labels: names of the classes.
        table: table[t][p] rows of the true class t were predicted to be of p.
    """

    labels: list[str]
    table: list[list[int]]

    @classmethod
    def of(cls, labels: Sequence[str], true: Iterable[int], predicted: Iterable[int]) -> Confusion:
        """Count; `true` and `predicted` are the class numbers of the same rows."""
        table = [[0] * len(labels) for _ in labels]
        for t, p in zip(true, predicted, strict=True):
            table[t][p] += 1
        return cls(list(labels), table)

    @property
    def rows(self) -> int:
        """How many rows were counted."""
        return sum(map(sum, self.table))

    @property
    def accuracy(self) -> float:
        """Share of the rows that were predicted right."""
        return sum(self.table[c][c] for c in range(len(self.labels))) / max(self.rows, 1)

    @property
    def majority(self) -> float:
        """The accuracy of always predicting the class that has most rows here."""
        return max(map(sum, self.table)) / max(self.rows, 1)

    @property
    def macro_f1(self) -> float:
        """The plain mean over the classes of F1 = 2 right / (true + predicted); 0 for a class that is in neither."""
        return sum(self._f1(c) for c in range(len(self.labels))) / len(self.labels)

    def _f1(self, c: int) -> float:
        true, predicted = sum(self.table[c]), sum(row[c] for row in self.table)
        return 2 * self.table[c][c] / (true + predicted) if true + predicted else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values: the three figures, rows, confusion (the table), and each class's rows, predicted and right."""
        classes = {
            name: {
                "rows": sum(self.table[c]),
                "predicted": sum(row[c] for row in self.table),
                "right": self.table[c][c],
            }
            for c, name in enumerate(self.labels)
        }
        return {
            "accuracy": self.accuracy,
            "majority_accuracy": self.majority,
            "macro_f1": self.macro_f1,
            "rows": self.rows,
            "classes": classes,
            "confusion": self.table,
        }
