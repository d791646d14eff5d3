"""Next tokens: a talk with a model, and how its tokens are chosen."""

from lilliput.generation.chat import ChatSession, end_tokens
from lilliput.generation.sampling import Sampling

__all__ = ["ChatSession", "Sampling", "end_tokens"]
