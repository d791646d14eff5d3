"""How text is cut into words before byte-pair encoding, under the names that GGUF has for it (`tokenizer.ggml.pre`).

llama.cpp knows a few dozen names and for each of them its own regular expressions; a file holds the name alone. Here a
name is found by what a tokenizer does: the row that cuts a text of hard cases as it does. (llama.cpp's converter knows
tokenizers by a hash of their tokens, so that one added token makes a tokenizer unknown; cuts do not depend on tokens.)
Source: llama.cpp, src/llama-vocab.cpp. Not here: vocabularies (vocabulary.py), text of sentencepiece, which is not cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s|{_REST % ''}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (  # words end where lower case is followed by upper case; %s: what may follow a word, and how long numbers are
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s|{_REST % '/'}"
)

# Digits in runs of every length, short forms in both cases, letters of many scripts with and without marks, upper case
# in words, blanks and line ends of every kind, punctuation that touches all of them.
PROBE = (
    "Hello  world\n\n \t it's IT'S I've 'LL we'Re o'clock 1 22 333 4444 55555 1,234.5 a1b22c x²½ e\u0301te\u0301 "
    "naïve straße ΣΊΓΜΑ привет 你好世界 こんにちは 안녕 हिन्दी ไทย 🦙🦙 👩\u200d🚀 camelCase HTMLParser ABCdef "
    "(paren) [x]!?... -- ==== #tag @me /path/to\n/// $9.99 50% \r\n\r\n   end.\n  \n\u00a0\u3000 \ttail   "
)


@dataclass(frozen=True)
class Cut:
    """A way to cut.

    Attributes:
        names: in `tokenizer.ggml.pre`; the first one is written.
        splits: regular expressions, applied one after another to the pieces of the one before.
        ignore_merges: a word that is a token is that token, whatever the merges would give.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignore_merges: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        """As the `tokenizers` library does it."""
        splits = [Split(Regex(pattern), behavior="isolated") for pattern in self.splits]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


CUTS = (
    Cut(("gpt-2", "phi-2", "mpt", "olmo", "exaone4"), (_GPT2,)),
    Cut(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    Cut(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_WORDS % "{1,3}",), ignore_merges=True),
    Cut(("smaug-bpe", "dbrx"), (_WORDS % "{1,3}",)),
    Cut(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (_WORDS % "",)),
    Cut(("tekken",), (_CASED % ("", "", ""),), ignore_merges=True),
    Cut(("gpt-4o", "llama4", "kanana2"), (_CASED % (f"{_SHORT}?", f"{_SHORT}?", "{1,3}"),)),
)


def cut_named(name: str) -> Cut | None:
    """The row of a name; None when it is not known here."""
    return next((cut for cut in CUTS if name in cut.names), None)


def name_of(tokenizer: Tokenizer, ignore_merges: bool) -> str | None:
    """The name of how a byte-pair tokenizer cuts text; None when no row does the same."""
    if tokenizer.pre_tokenizer is None:
        return None
    wanted = tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    same = (cut for cut in CUTS if cut.ignore_merges == ignore_merges)
    return next((cut.names[0] for cut in same if cut.pre_tokenizer().pre_tokenize_str(PROBE) == wanted), None)
