import zlib
from contextlib import ExitStack

import pytest

from tools import check_site

GOOD = """<!doctype html><html><head><link rel="icon" href="dot.svg"></head><body>
<h1 id="top">Page</h1><a href="#top">up</a> <a href="other.html#end">other</a>
<article><img src="dot.svg"></article><math><mi>x</mi></math></body></html>"""
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><path d="M0 0H4V4Z"/></svg>'
OTHER = '<!doctype html><link rel="icon" href="dot.svg"><p id="end">End</p>'


@pytest.fixture
def site(tmp_path):
    """A site in which nothing is wrong."""
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "other.html").write_text(OTHER)
    (tmp_path / "dot.svg").write_text(DOT)
    write_inventory(tmp_path, check_site.public_names())
    return tmp_path


def write_inventory(site, names):
    lines = "".join(f"{name} py:class 1 page.html#$ -\n" for name in names)
    head = b"# Sphinx inventory version 2\n# Project: x\n# Version: 0\n# zlib\n"
    (site / "objects.inv").write_bytes(head + zlib.compress(lines.encode()))


def test_links_and_anchors_that_lead_somewhere_are_no_problem(site):
    assert check_site.broken_links(site) == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("nowhere.html", "index.html: no such file: nowhere.html"),
        ("other.html#nowhere", "index.html: no such anchor: other.html#nowhere"),
        ("#nowhere", "index.html: no such anchor: #nowhere"),
    ],
    ids=["file", "anchor of another page", "anchor"],
)
def test_a_link_that_leads_nowhere_is_found(site, link, problem):
    (site / "index.html").write_text(GOOD.replace("other.html#end", link))
    assert check_site.broken_links(site) == [problem]


def test_a_name_that_the_reference_lacks_is_found(site):
    assert check_site.missing_names(site) == []
    write_inventory(
        site, check_site.public_names().keys() - {"lightning_revflip.callbacks.Flipout"}
    )
    assert check_site.missing_names(site) == [
        "reference: lightning_revflip.callbacks.Flipout is missing"
    ]


def test_public_names_are_those_of_modules_with_and_without_all():
    names = check_site.public_names()
    assert {"lightning_revflip.RevLSTM", "lightning_revflip.convert.load_from_checkpoint"} <= set(
        names
    )
    assert "lightning_revflip.convert.Tensor" not in names  # imported, not defined there


def test_without_chromium_the_browser_is_skipped_and_said_so(site, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as exit:
        check_site.main([str(site)])
    assert exit.value.code == 0
    assert "skipped: no Chromium" in capsys.readouterr().out


def test_a_browser_that_does_not_start_is_said_so(site, monkeypatch, tmp_path, capsys):
    pytest.importorskip("selenium")
    for name in ("chromium", "chromedriver"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SystemExit) as exit:
        check_site.main([str(site)])
    assert exit.value.code == 0
    assert "skipped: Chromium does not start" in capsys.readouterr().out


@pytest.fixture(scope="module")
def window():
    pytest.importorskip("selenium")
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(check_site.chromium())
        except check_site.BrowserError as error:
            pytest.skip(str(error))
        yield browser


@pytest.mark.slow
def test_what_a_browser_would_show_broken_is_found(site, window):
    assert check_site.broken_pages(site, window) == []

    broken = {
        "dot.svg": "nowhere.svg",
        "<article>": r"<article>$$\frac{1}{2}$$ <code>$$x$$</code>",
        "<math>": '<math style="display: none">',
        "</body>": "<script>missing()</script><script src='http://nowhere.invalid/x.js'></script></body>",
    }
    text = GOOD.replace('rel="icon" href="dot.svg"', 'rel="icon" href="data:,"')
    for good, bad in broken.items():
        text = text.replace(good, bad)
    (site / "index.html").write_text(text)
    found = "\n".join(check_site.broken_pages(site, window))
    assert "index.html: broken image nowhere.svg" in found
    assert "index.html: math without a size" in found
    assert "index.html: formula left as LaTeX" in found
    assert "missing is not defined" in found
    assert "asks for http://nowhere.invalid/x.js" in found


@pytest.mark.slow
def test_a_start_page_without_a_figure_is_found(site, window):
    (site / "index.html").write_text(GOOD.replace('<img src="dot.svg">', ""))
    assert check_site.broken_pages(site, window) == ["index.html: no figure"]
