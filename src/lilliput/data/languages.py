"""Which language a text is in, as far as it can be told.

py3langid (a naive Bayes classifier over byte sequences, 97 languages, offline; after Lui and Baldwin, langid.py, 2012)
names the most likely one with a probability; below SURE the answer is UNSURE, which is the honest one for a few words,
for code and for numbers. Not here: sampling (`portrait.py`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

SURE = 0.9
UNSURE = "unsure"
_CHARACTERS = 2000  # of a text; more of it changes no answer


def language_of(text: str) -> str:
    """The language of `text` in two letters (ISO 639-1: "en"), or UNSURE. The first call loads the model: a second."""
    language, probability = _identifier().classify(text[:_CHARACTERS])
    return str(language) if probability >= SURE else UNSURE


@cache
def _identifier() -> Any:
    from py3langid import langid  # type: ignore[import-untyped]  # here: loading it takes a while

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
