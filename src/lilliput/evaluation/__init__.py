"""Is it good, is it the same: perplexity over text, exact match over records, a classifier's accuracy."""

from lilliput.evaluation.classify import ClassifyScore, Prediction, predict, score_classes
from lilliput.evaluation.exact_match import ExactResult, exact_match, same_answer
from lilliput.evaluation.perplexity import PerplexityResult, perplexity, read_text

__all__ = [
    "ClassifyScore",
    "ExactResult",
    "PerplexityResult",
    "Prediction",
    "exact_match",
    "perplexity",
    "predict",
    "read_text",
    "same_answer",
    "score_classes",
]
