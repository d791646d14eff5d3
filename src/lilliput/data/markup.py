"""HTML to text, for the turns that ShareGPT saved as web pages: words, line breaks, lists and code blocks are kept.

Only a turn that is wholly HTML is touched (`is_html`): it begins with an element of the page and ends with a closing
one. A person who asks about `<div>` keeps it. Not here: Markdown, pages of any kind (a browser's work).
"""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

_BLOCKS = (
    "div",
    "p",
    "pre",
    "ul",
    "ol",
    "table",
    "blockquote",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "section",
    "article",
)
_WHOLE = re.compile(rf"\s*<({'|'.join(_BLOCKS)})(\s[^<>]*)?>.*</({'|'.join(_BLOCKS)})>\s*", re.DOTALL | re.IGNORECASE)
_DROPPED = ("button", "script", "style", "svg", "head", "title")  # "Copy code" and the like: not said by anybody
_ENDS = re.compile(rf"</({'|'.join(_DROPPED)})\s*>", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\r\n\f]+")


def is_html(text: str) -> bool:
    """Whether a text is wholly HTML, from the first element to the last."""
    return text.lstrip()[:1] == "<" and _WHOLE.fullmatch(text) is not None


def html_to_text(html: str) -> str:
    """The words of a piece of HTML: a line a paragraph, items behind "- " or "1. ", code between backticks as it is.

    Broken HTML gives the words that are in it; an element that is never closed hides none.
    """
    try:
        return _read(html)
    except AssertionError:  # so html.parser answers `<![foo[`, which is a declaration of no kind that it knows
        return _read(html.replace("<![", "&lt;!["))


def _read(html: str) -> str:
    reader = _Reader(html)
    reader.feed(html)
    reader.close()
    return reader.text()


class _Reader(HTMLParser):
    """Collects text; white space is one space outside code, as a browser shows it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._lists: list[int] = []  # of each open list the number of its next item, -1 where it has none
        self._ends = Counter(tag.lower() for tag in _ENDS.findall(html))  # still to come, of elements that are dropped
        self._silent: Counter[str] = Counter()  # open ones of these: each has an end that is still to come
        self._code = 0  # open <pre>

    def text(self) -> str:
        """What was read, with no more than one blank line in a row outside code."""
        joined = "".join(self._parts)
        pieces = re.split(r"(```.*?\n```)", joined, flags=re.DOTALL)
        plain = [re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *(?=\n)| +\n", "\n", piece)) for piece in pieces[0::2]]
        return "".join(p + c for p, c in zip(plain, [*pieces[1::2], ""], strict=True)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _DROPPED:
            self._silent[tag] += self._ends[tag] > self._silent[tag]
        elif tag == "pre":
            self._break(2)
            self._code += 1
            self._parts.append("```\n")
        elif tag in ("ul", "ol"):
            self._break(1 if self._lists else 2)
            self._lists.append(1 if tag == "ol" else -1)
        elif tag == "li":
            self._item()
        elif tag == "br":
            self._parts.append("\n")
        elif tag == "code" and not self._code:
            self._parts.append("`")
        elif tag in _BLOCKS or tag == "tr":
            self._break(1 if tag in ("div", "tr") or self._lists else 2)
        elif tag in ("td", "th") and self._parts and not self._parts[-1].endswith((" ", "\n")):
            self._parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in _DROPPED:
            self._ends[tag] = max(self._ends[tag] - 1, 0)
            self._silent[tag] = max(self._silent[tag] - 1, 0)
        elif tag == "pre" and self._code:
            self._code -= 1
            self._break(1)
            self._parts.append("```\n\n")
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
            self._break(1 if self._lists else 2)
        elif tag == "code" and not self._code:
            self._parts.append("`")
        elif tag in _BLOCKS or tag in ("tr", "li"):
            self._break(1 if tag in ("div", "tr", "li") or self._lists else 2)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _DROPPED:  # `<svg/>` holds no words, and closes no other
            super().handle_startendtag(tag, attrs)

    def set_cdata_mode(self, elem: str, **how: bool) -> None:
        """Read no markup up to the end of a script, unless it has none: then it is markup as any."""
        if elem not in _DROPPED or self._silent[elem]:
            super().set_cdata_mode(elem, **how)

    def handle_data(self, data: str) -> None:
        if any(self._silent.values()):
            return
        if self._code:
            self._parts.append(data)
            return
        words = _SPACE.sub(" ", data)
        if not self._parts or self._parts[-1].endswith(("\n", " ")):
            words = words.lstrip(" ")
        if words:
            self._parts.append(words)

    def _item(self) -> None:
        self._break(1)
        number = self._lists[-1] if self._lists else -1
        if number > 0:
            self._lists[-1] += 1
        indent = "  " * (len(self._lists) - 1)
        self._parts.append(f"{indent}{number}. " if number > 0 else f"{indent}- ")

    def _break(self, lines: int) -> None:
        """At least so many line breaks, unless nothing or an item's mark stands before."""
        tail = "".join(self._parts[-3:])
        if not tail or re.search(r"(^|\n) *(- |\d+\. )$", tail):
            return
        there = len(tail) - len(tail.rstrip("\n"))
        if there < lines:
            self._parts.append("\n" * (lines - there))
