import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.html import HTMLError, has_words, to_markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>One</p>\n\n<p>Two</p>\n", "One\n\nTwo"),
        ("<h2>Head</h2><p>x</p>", "## Head\n\nx"),
        ("<p>snake_case and 2 * 3 * 4</p>", "snake_case and 2 * 3 * 4"),
        ("<p><em>a</em> <strong>b</strong></p>", "*a* **b**"),
        ("<p>Use <code>ls -l *_*</code>.</p>", "Use `ls -l *_*`."),
        ("<p><code>a `tick` b</code></p>", "`` a `tick` b ``"),
        ('<p><a href="https://x.example/a_b">it</a></p>', "[it](https://x.example/a_b)"),
        ('<p><a href="https://x.example/a_b">https://x.example/a_b</a></p>', "<https://x.example/a_b>"),
        ("<ul>\n<li>a</li>\n<li>b\n<ul><li>c</li></ul></li>\n</ul>", "- a\n- b\n  - c"),
        ('<ol start="3"><li>a</li><li>b</li></ol>', "3. a\n4. b"),
        ("<blockquote>\n  <p>said</p>\n</blockquote>\n<p>ok</p>", "> said\n\nok"),
        ("<p>10<sup>2</sup> H<sub>2</sub>O</p>", "10<sup>2</sup> H<sub>2</sub>O"),
        ("<p>a<br>b</p>", "a  \nb"),
        ("<p>x</p><hr><p>y</p>", "x\n\n---\n\ny"),
        ('<p><img src="https://i.example/1.png" alt="a plot"></p>', "![a plot](https://i.example/1.png)"),
        ("<p>a &lt; b &amp;&amp; c</p>", "a < b && c"),
        ("<p>x</p><!-- begin snippet: js hide: false -->", "x"),
        ("plain", "plain"),
        ("https://x.example/", "https://x.example/"),
        ("", ""),
        ("<p> </p>\n", ""),
    ],
)
def test_cases(html, markdown):
    assert to_markdown(html) == markdown


@pytest.mark.parametrize(
    "formula",
    [
        r"$x_1 * y_2^{*}$",
        r"$$\sum_{i=1}^{n} a_i\,b_i^* \\ \left[\frac{1}{2}\right] < a_1 & b_2$$",
        r"\(|\psi_0\rangle\)",
        r"$a\_b$",
    ],
)
def test_mathjax_is_untouched(formula):
    html = formula.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert to_markdown(f"<p>Let {html} be.</p>") == f"Let {formula} be."


def test_code_block_keeps_every_character():
    code = 'def f(*args, **kw):\n    x_1 = a < b and c > d  # "&amp;"\n\n\n\treturn `x`'
    html = code.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert to_markdown(f"<pre><code>{html}\n</code></pre>") == f"```\n{code}\n```"


def test_code_block_has_its_language():
    assert to_markdown('<pre class="lang-py prettyprint-override"><code>x\n</code></pre>') == "```py\nx\n```"
    assert to_markdown('<pre class="lang-none"><code>x</code></pre>') == "```\nx\n```"
    assert to_markdown('<pre class="lang-c++ s-code-block"><code>x</code></pre>') == "```c++\nx\n```"


def test_fence_is_longer_than_any_inside():
    html = '<pre class="lang-md"><code>```\ncode\n````\n</code></pre>'
    assert to_markdown(f"<p>a</p>{html}<p>b</p>") == "a\n\n`````md\n```\ncode\n````\n`````\n\nb"


def test_code_block_in_a_list():
    html = "<ol><li><p>do</p>\n<pre><code>a\n  b\n</code></pre></li></ol>"
    wanted = textwrap.dedent("""\
        1. do

           ```
           a
             b
           ```""")
    assert to_markdown(html) == wanted


@pytest.mark.parametrize(
    ("markdown", "wanted"),
    [
        ("[![enter image description here](https://i.example/a.png)](https://x.example)", False),
        ("![plot](a.png)\n\n![](b.png)", False),
        ("![plot](a.png) see", True),
        ("[here](https://x.example)", True),
        ("—\n\n…", False),
        ("", False),
        ("42", True),
        ("中文", True),
        ("$\\alpha$", True),
    ],
)
def test_has_words(markdown, wanted):
    assert has_words(markdown) is wanted


@pytest.mark.parametrize("html", ["<div>" * 5000 + "x", '<ol start="²"><li>x</li></ol>', "<![foo"])
def test_hostile_html_is_one_error(html):
    try:
        assert isinstance(to_markdown(html), str)
    except HTMLError as error:
        assert "\n" not in str(error)


def test_deep_nesting_is_refused():
    with pytest.raises(HTMLError, match="RecursionError"):
        to_markdown("<div>" * 5000 + "x")


@given(st.text(alphabet="<>/![]-&;=\"' \nabpreolicdt12²", max_size=60))
def test_any_text_converts_or_is_refused(html):
    try:
        assert isinstance(to_markdown(html), str)
    except HTMLError:
        pass
