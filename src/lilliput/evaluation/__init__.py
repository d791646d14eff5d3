"""Is it good, is it the same: perplexity of text, exact match over records, a classifier's accuracy, what int8 does."""

from lilliput.evaluation.classify import ClassifyScore, Prediction, predict, score_classes
from lilliput.evaluation.comparison import Int8Comparison, compare_int8
from lilliput.evaluation.exact_match import ExactResult, exact_match, same_answer
from lilliput.evaluation.outliers import OutlierReport, find_outliers, watched
from lilliput.evaluation.perplexity import PerplexityResult, perplexity, read_text

__all__ = [
    "ClassifyScore",
    "ExactResult",
    "Int8Comparison",
    "OutlierReport",
    "PerplexityResult",
    "Prediction",
    "compare_int8",
    "exact_match",
    "find_outliers",
    "perplexity",
    "predict",
    "read_text",
    "same_answer",
    "score_classes",
    "watched",
]
