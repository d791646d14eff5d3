"""What a data set looks like: one example coloured by label, and a few figures.

Not here: judging the data. The figures are there so that a person sees a mistake before an hour of training does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from rich.text import Text

from lilliput.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL_STYLE = "bold green"
OTHER_STYLE = "dim"


def show_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The example's text, control tokens included: labels in LABEL_STYLE, all else in OTHER_STYLE."""
    text = Text()
    written = ""
    for end in _run_ends(example.label_mask):
        so_far = str(
            tokenizer.decode(example.input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        text.append(so_far[len(written) :], style=LABEL_STYLE if example.label_mask[end - 1] else OTHER_STYLE)
        written = so_far
    return text


def _run_ends(label_mask: list[bool]) -> list[int]:
    """Where runs of labels and of others end (one past the last token of each)."""
    return [
        end for end in range(1, len(label_mask) + 1) if end == len(label_mask) or label_mask[end] != label_mask[end - 1]
    ]


@dataclass(frozen=True)
class Figures:
    """Counts over examples; lengths in tokens."""

    examples: int
    tokens: int
    labels: int
    shortest: int
    median: float
    longest: int
    duplicates: int  # examples whose tokens an earlier one has already

    def __str__(self) -> str:
        repeats = f"{self.duplicates:,} duplicate{'' if self.duplicates == 1 else 's'}"
        share = self.labels / self.tokens if self.tokens else 0.0
        return (
            f"{self.examples:,} examples, {self.tokens:,} tokens, {share:.0%} of them labels; "
            f"lengths {self.shortest:,} to {self.longest:,}, median {self.median:,.0f}; {repeats}"
        )


def figures(examples: Sequence[Example]) -> Figures:
    """Lengths, labels and duplicates of a set of examples; all zero for an empty one."""
    lengths = [len(example) for example in examples]
    return Figures(
        examples=len(examples),
        tokens=sum(lengths),
        labels=sum(example.labels for example in examples),
        shortest=min(lengths, default=0),
        median=median(lengths) if lengths else 0,
        longest=max(lengths, default=0),
        duplicates=len(examples) - len({tuple(example.input_ids) for example in examples}),
    )
