"""What a generation has used so far: requests, tokens, money.

Not here: what a model costs; prices are the person's, per million tokens, in any currency.
"""

from __future__ import annotations

from dataclasses import dataclass

from lilliput.synthesis.teacher import Reply


@dataclass(frozen=True)
class Price:
    """What a million tokens cost: of prompts, and of answers (completions). 0 where nothing is charged."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost of that many tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass
class Spent:
    """Sums over answers.

    requests: answers, those that failed included. failed: of these. retries: tries beyond the first of each request.
    seconds: sum over requests, so with several in flight more than has passed on the clock.
    """

    requests: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def add(self, reply: Reply) -> None:
        """Count one answer."""
        self.requests += 1
        self.failed += bool(reply.error)
        self.retries += reply.tries - 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.seconds += reply.seconds

    def line(self, price: Price) -> str:
        """One line for people; what is 0 is left out."""
        tokens = self.prompt_tokens + self.completion_tokens
        cost = price.of(self.prompt_tokens, self.completion_tokens)
        parts = (
            (self.requests, f"{self.requests:,} requests"),
            (tokens, f"{tokens:,} tokens"),
            (cost, f"cost {cost:,.2f}"),
            (self.failed, f"{self.failed:,} failed"),
            (self.retries, f"{self.retries:,} retries"),
        )
        return ", ".join(said for number, said in parts if number)
