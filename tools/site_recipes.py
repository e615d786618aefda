"""A hook of MkDocs: the pages of recipes/ in the site, with links that work there and on GitHub.

In the repository docs/ and recipes/ are neighbours, in the site recipes/ is a folder of the root.
Links between them are written as GitHub wants them and rewritten here. A link to a file that the
site does not have, such as a source, is left as its text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the model cards of the recipes and their figures."""
    for kind in ("README.md", "*.png"):
        for path in sorted(ROOT.glob(f"recipes/*/{kind}")):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page to other files of the repository."""
    folder = Path(page.file.abs_src_path or "").parent

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match.groups("")
        path = (folder / target).resolve()
        if not (path.exists() and path.is_relative_to(ROOT)):
            return match[0]  # an address, or for MkDocs to report
        uri = path.relative_to(ROOT).as_posix().removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return text
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{anchor})"

    return LINK.sub(rewritten, markdown)
