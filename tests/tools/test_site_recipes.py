from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs")

from tools import site_recipes

PAGES = {"flipout.md", "recipes/mnist/README.md", "recipes/ptb/README.md"}


def rewritten(source, markdown):
    """A page of the repository as it enters the site."""
    uri = source.removeprefix("docs/")
    file = SimpleNamespace(abs_src_path=str(site_recipes.ROOT / source), src_uri=uri)
    files = SimpleNamespace(get_file_from_path=lambda path: path if path in PAGES else None)
    return site_recipes.on_page_markdown(markdown, SimpleNamespace(file=file), None, files)


@pytest.mark.parametrize(
    ("source", "markdown", "expected"),
    [
        (
            "recipes/mnist/README.md",
            "see [Flipout](../../docs/flipout.md#questions)",
            "see [Flipout](../../flipout.md#questions)",
        ),
        (
            "docs/flipout.md",
            "see [the\nrecipe](../recipes/mnist/README.md)",
            "see [the\nrecipe](recipes/mnist/README.md)",
        ),
        ("recipes/mnist/README.md", "in [`module.py`](module.py)", "in `module.py`"),
        ("recipes/mnist/README.md", "[x](https://example.org/a)", "[x](https://example.org/a)"),
        ("recipes/mnist/README.md", "[x](missing.md)", "[x](missing.md)"),
        ("recipes/mnist/README.md", "[x](#measured)", "[x](#measured)"),
        ("recipes/mnist/README.md", "![x](apd_toy.png)", "![x](apd_toy.png)"),
    ],
    ids=["to docs", "to a recipe", "to a source", "address", "missing", "anchor", "image"],
)
def test_links_of_github_become_links_of_the_site(source, markdown, expected):
    assert rewritten(source, markdown) == expected
