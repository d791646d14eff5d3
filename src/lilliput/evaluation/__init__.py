"""Is it good, is it the same: perplexity over text, exact match over records; where outliers are and what int8 does."""

from lilliput.evaluation.comparison import Int8Comparison, compare_int8
from lilliput.evaluation.exact_match import ExactResult, exact_match, same_answer
from lilliput.evaluation.outliers import OutlierReport, find_outliers, watched
from lilliput.evaluation.perplexity import PerplexityResult, perplexity, read_text

__all__ = [
    "ExactResult",
    "Int8Comparison",
    "OutlierReport",
    "PerplexityResult",
    "compare_int8",
    "exact_match",
    "find_outliers",
    "perplexity",
    "read_text",
    "same_answer",
    "watched",
]
