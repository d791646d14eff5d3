"""Is it good, is it the same: perplexity over text, exact match over records."""

from lilliput.evaluation.exact_match import ExactResult, exact_match, same_answer
from lilliput.evaluation.perplexity import PerplexityResult, perplexity, read_text

__all__ = ["ExactResult", "PerplexityResult", "exact_match", "perplexity", "read_text", "same_answer"]
