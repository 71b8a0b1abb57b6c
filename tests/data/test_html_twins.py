"""The fast converter against the slow one, which says what is right."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data import html
from tasks.data.dump import read_rows
from tasks.data.html import HTMLError, convert_slowly, to_markdown
from tasks.data.sources import Source, site_of

SMALL = (
    "small/coffee.stackexchange.com.Posts.xml.xz",
    "small/arabic.meta.stackexchange.com.Posts.xml.xz",
    "main/3dprinting.stackexchange.com.Posts.xml.xz",
    "main/meta.mathoverflow.net.Posts.xml.xz",
)
OTHERS = (
    "main/devops.stackexchange.com.Posts.xml.xz",
    "main/beer.stackexchange.com.7z",
    "main/quantumcomputing.stackexchange.com.Posts.xml.xz",
    "main/matheducators.stackexchange.com.Posts.xml.xz",
    "main/cstheory.meta.stackexchange.com.Posts.xml.xz",
    "main/history.meta.stackexchange.com.Posts.xml.xz",
    "main/bicycles.meta.stackexchange.com.Posts.xml.xz",
    "main/french.meta.stackexchange.com.Posts.xml.xz",
    "main/datascience.meta.stackexchange.com.Posts.xml.xz",
)
ATTRIBUTES = {
    "a": (' href="http://x.y/a_b"', ' href="u&amp;v" title="t &quot;q&quot;"', "", ' href="ab"', ' rel="x"'),
    "pre": ("", ' class="lang-py prettyprint-override"', ' class="lang-none"', ' class="x language-c++"'),
    "ol": ("", ' start="3"', ' start="x"', ' start="-1"', ' start="²"'),
}
TAGS = "a code em strong sup sub kbd del b i s span p pre ul ol li blockquote h1 h3 div table tr td".split()
REFERENCES = "&lt; &amp; &quot; &#39; &nbsp; &hellip; &#xA0; &#150; &#29; &thinsp; &zwnj; & &lt &copy".split()
LONE = ("<br>", "<br />", "<hr>", '<img src="a.png" alt="b c">', '<img src="a">', "<!-- end snippet -->")
BROKEN = ("</p>", "<p>", "<b ", "<P>", "<![x", "<!-- -->", "```x", "````", "\n\n", " ", "\r")
PIECES = (*REFERENCES, *LONE, *BROKEN)


def convert(converter, text: str) -> str | None:
    try:
        return converter(text)
    except HTMLError:
        return None


def element(inside: tuple[str, list[str], int]) -> str:
    name, children, choice = inside
    options = ATTRIBUTES.get(name, ("",))
    return f"<{name}{options[choice % len(options)]}>{''.join(children)}</{name}>"


PROSE = st.text(alphabet="ab1 \n$_*`\\#-.|[]()!é~+=:'\"\t", max_size=12)
LEAF = st.one_of(PROSE, PROSE, st.sampled_from(PIECES))
POST = st.lists(
    st.recursive(
        LEAF,
        lambda inner: st.tuples(
            st.sampled_from(TAGS), st.lists(inner, max_size=4), st.integers(0, 9)
        ).map(element),
        max_leaves=10,
    ),
    max_size=4,
).map("".join)  # fmt: skip


SPACE = st.sampled_from(("", "\n", "\n  "))
INSIDE = st.one_of(
    LEAF, st.tuples(st.sampled_from(TAGS), st.lists(LEAF, max_size=1), st.integers(0, 9)).map(element)
)
CELL = st.tuples(
    st.sampled_from(("td", "td", "th")), st.sampled_from(("", ' align="left"', ' colspan="2"')), INSIDE
)
ROW = st.tuples(SPACE, st.lists(CELL.map(lambda c: f"<{c[0]}{c[1]}>{c[2]}</{c[0]}>"), max_size=2)).map(
    lambda row: f"<tr>{row[0]}{row[0].join(row[1])}</tr>"
)
PART = st.tuples(st.sampled_from(("thead", "tbody")), SPACE, st.lists(ROW, max_size=2)).map(
    lambda part: f"<{part[0]}>{part[1].join(part[2])}</{part[0]}>"
)
TABLE = st.tuples(SPACE, LEAF, st.lists(st.one_of(PART, ROW), max_size=2)).map(
    lambda table: f"{table[1]}<table>{table[0]}{table[0].join(table[2])}</table>{table[1]}"
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(POST, TABLE))
def test_any_html(text):
    assert convert(to_markdown, text) == convert(convert_slowly, text)


def same_on(path, monkeypatch) -> tuple[int, int]:
    """(posts, posts that the slow converter did) after comparing every post of a site."""
    slow = []
    monkeypatch.setattr(html, "convert_slowly", lambda text: slow.append(1) or convert_slowly(text))
    bodies: list[str] = []
    read_rows(Source(path, site_of(path)), "posts", lambda row: bodies.append(row.get("Body", "")))
    for body in bodies:
        assert convert(to_markdown, body) == convert(convert_slowly, body)
    return len(bodies), len(slow)


@pytest.mark.parametrize("name", SMALL)
def test_every_post_of_a_small_site(dumps, name, monkeypatch):
    posts, slow = same_on(dumps / name, monkeypatch)
    assert slow < posts / 10  # else nothing was compared


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_post_of_a_site(dumps, name, monkeypatch):
    posts, slow = same_on(dumps / name, monkeypatch)
    assert slow < posts / 10


@pytest.mark.parametrize(
    "text",
    [
        "<p>x</p>" * 2000,
        "<div>" * 30 + "x" + "</div>" * 30,
        '<pre class="lang-py"><code>x\n</code></pre><p>a</p><pre><code>y</code></pre>',
        "<pre><pre>1</pre></pre>",
        "<p>a\x01b</p>",
    ],
)
def test_corners(text):
    assert to_markdown(text) == convert_slowly(text)


def test_a_thousand_deep_never_reaches_the_fast_one():
    assert convert(to_markdown, "<b>" * 5000 + "</b>" * 5000) is None
