"""HTML becomes text: what is kept, what is dropped, and what is left alone."""

from __future__ import annotations

import pytest

from lilliput.data.markup import html_to_text, is_html

CASES = {
    "paragraphs": ("<p>One  two\nthree</p><p>Four</p>", "One two three\n\nFour"),
    "line break": ("<p>One<br>two<br/>three</p>", "One\ntwo\nthree"),
    "entities": ("<p>a &lt;b&gt; &amp; c&#39;s&nbsp;d</p>", "a <b> & c's\u00a0d"),
    "list": ("<ul><li>One</li><li><p>Two</p></li></ul>", "- One\n- Two"),
    "numbered": ("<p>Do:</p><ol><li>One</li><li>Two</li></ol><p>Done.</p>", "Do:\n\n1. One\n2. Two\n\nDone."),
    "nested": ("<ul><li>One<ul><li>Deep</li></ul></li><li>Two</li></ul>", "- One\n  - Deep\n- Two"),
    "code block": (
        "<div><pre><div>python<button>Copy code</button></div><code>if a:\n\n\n    b &lt; 1\n</code></pre></div>",
        "```\npython\nif a:\n\n\n    b < 1\n```",
    ),
    "code in words": ("<p>Use <code>a  b</code> <b>now</b>.</p>", "Use `a b` now."),
    "heading": ("<h2>Title</h2><p>Words</p>", "Title\n\nWords"),
    "table": ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>", "a b\nc d"),
    "nobody said it": ("<div><style>p {}</style><script>x()</script><svg><p>i</p></svg>Hi</div>", "Hi"),
    "broken": ("<div><p>One<p>Two</ul></pre></b>", "One\n\nTwo"),
    "no declaration": ("<div><![foo[ bar ]]></div>", "<![foo[ bar ]]>"),
    "script never closed": ("<p>a<script>x</p><p>more words</p>", "ax\n\nmore words"),
    "title never closed": ("<p>if a &lt; b <title> hello</p>", "if a < b hello"),
    "button never closed": ("<div><button>Copy<p>Hello world</p></div>", "Copy\n\nHello world"),
    "one of two closed": ("<p><button>Copy</button>a<button>b</p>", "ab"),
    "closed before": ("<p>a</button><button>b</p>", "ab"),
    "closed at once": ("<p>a<svg/>b<svg><i>x</i></svg>c</p>", "abc"),
    "nothing": ("<div><br></div>", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_html_to_text(case: str) -> None:
    html, text = CASES[case]
    assert html_to_text(html) == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<p>Hi</p>", True),
        ('\n <div class="markdown prose"><p>Hi</p>\n</div> ', True),
        ("<P>Hi</P>", True),
        ("What does <div>Hi</div> do?", False),
        ("<div> is what?", False),
        ("<custom>Hi</custom>", False),
        ("```html\n<p>Hi</p>\n```", False),
        ("<pre", False),
        ("", False),
        ("1 < 2 and </p>", False),
    ],
)
def test_only_what_is_wholly_html_is_touched(text: str, found: bool) -> None:
    assert is_html(text) is found


def test_a_long_text_of_open_brackets_is_quick() -> None:
    assert not is_html("<div>" * 100_000)
    assert html_to_text("<div>" * 20_000 + "a") == "a"
