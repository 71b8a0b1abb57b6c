import pytest

from tasks.data.plain import DEEPEST, languages_if_plain


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("", []),
        ("no tag & no reference;".replace("& ", ""), []),
        ('<p>a > b &lt; c &eacute; &#39;<br><img src="x.png" alt="&quot;é&quot;" /></p>', []),
        ('<pre class="x lang-py s-code-block"><code>1</code></pre><pre>2</pre>', ["py", ""]),
        ('<pre class="lang-none"></pre>', []),
        ("<!-- begin snippet: js hide: false -->", []),
        ('<a href="u" aria-label="l">x</a>', []),
        ("<table><thead><tr><th>a</th></tr></thead><tr><td>b</td></tr></table>", []),
        ("<div>" * DEEPEST + "</div>" * DEEPEST, []),
    ],
)
def test_plain(text, languages):
    assert list(languages_if_plain([text])[0]) == languages


NOT_PLAIN = [
    "<p>", "</p>", "</p><p>", "<b><i></b></i>", "<i></b>", "<b></i>", "<p", "a < b", "<p><a</p>", "<P></P>",
    "<u>x</u>", "<p/>", "<b></b/>", "<a href=x>y</a>",
    "<a href='x'>y</a>", '<a href="a<b">y</a>', '<a href="a\nb">y</a>', "<!-- -->", "<![x",
    "&", "&;", "&lt", "&x;", "&#31;", "&#10000;", "&hell ip;", "a & b;", "&amp &amp;", "\r", "\x01", "```",
    "<td>x</td>", "<table><td>x</td></table>", "<tr><td>x</td></tr>", "<table><p><tr></tr></p></table>",
    "<pre><pre>1</pre></pre>", "<div>" * (DEEPEST + 1) + "</div>" * (DEEPEST + 1),
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_PLAIN)
def test_not_plain(text):
    assert languages_if_plain([text]) == [None]


def test_texts_do_not_mix():
    """What is wrong in one says nothing about its neighbours: each text of a batch is as it is alone."""
    good = ["<p>é</p>", '<pre class="lang-c">1</pre>', "", "&amp;", "x", "<table><tr><td>1</td></tr></table>"]
    texts = [text for bad in NOT_PLAIN for text in (*good, bad)] + good
    assert languages_if_plain(texts) == [found for text in texts for found in languages_if_plain([text])]
