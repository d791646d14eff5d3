"""Is it good, is it the same: perplexity, exact match, accuracy, what int8 does, how far two models agree."""

from lilliput.evaluation.agreement import Agreement, Passage, agreement, example_passages, hold, text_passages
from lilliput.evaluation.classify import ClassifyScore, Prediction, predict, score_classes
from lilliput.evaluation.comparison import Int8Comparison, compare_int8
from lilliput.evaluation.exact_match import ExactResult, exact_match, same_answer
from lilliput.evaluation.outliers import OutlierReport, find_outliers, watched
from lilliput.evaluation.perplexity import PerplexityResult, perplexity, read_text

__all__ = [
    "Agreement",
    "ClassifyScore",
    "ExactResult",
    "Int8Comparison",
    "OutlierReport",
    "Passage",
    "PerplexityResult",
    "Prediction",
    "agreement",
    "compare_int8",
    "exact_match",
    "example_passages",
    "find_outliers",
    "hold",
    "perplexity",
    "predict",
    "read_text",
    "same_answer",
    "score_classes",
    "text_passages",
    "watched",
]
