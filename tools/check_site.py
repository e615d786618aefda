"""Checks the built site: links, the reference, and every page in a headless Chromium.

    python -m tools.check_site [SITE] [--screenshots FOLDER]

Without a browser: every link and anchor within the site leads somewhere, and the reference has
every public name of the package. In Chromium, page by page: no error on the console, no request
to another host, every image loaded, every formula and figure with a size; search works from the
disk. Where there is no Chromium, that part is skipped, and says so.
"""

import argparse
import importlib
import inspect
import json
import pkgutil
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import lightning_revflip as package

METHODS = ("reversible", "sequence", "seq2seq", "flipout", "evolution", "sgld", "apd")
WITH_FIGURES = {f"{page}.html" for page in ("index", "benchmarks", *METHODS)}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)
BROKEN = r"""
for (const part of document.querySelectorAll("details")) part.open = true
const broken = []
for (const image of document.images)
  if (!image.naturalWidth) broken.push(`broken image ${image.getAttribute("src")}`)
for (const part of document.querySelectorAll("math, figure svg")) {
  const box = part.getBoundingClientRect()
  if (!(box.width && box.height)) broken.push(`${part.localName} without a size: ${part.outerHTML}`)
}
const text = document.querySelector("article")?.cloneNode(true)
text?.querySelectorAll("pre, code").forEach(part => part.remove())
if (/\$\$|\\[a-z]+\{/.test(text?.textContent)) broken.push("formula left as LaTeX")
return broken
"""
FIGURES = "return document.querySelectorAll('article img, article figure svg').length"


class BrowserError(Exception):
    """There is no browser that could look at pages; the message says why."""


class Page(HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {"", "__skip"}
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")


def broken_links(site: Path) -> list[str]:
    """Links within the site to a file or an anchor that is not there."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            target, anchor = urldefrag(unquote(link))
            # The page of missing files is served anywhere, so its links start at the root.
            folder = site if target.startswith("/") else path.parent
            found = (folder / target.lstrip("/")).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            if not found.exists():
                problems.append(f"{path.relative_to(site)}: no such file: {link}")
            elif found in pages and anchor not in pages[found].anchors:
                problems.append(f"{path.relative_to(site)}: no such anchor: {link}")
    return problems


def public_names() -> dict[str, Any]:
    """Every public class, function and value of the package and of its modules, by dotted name."""
    names = {f"lightning_revflip.{name}": getattr(package, name) for name in package.__all__}
    for found in pkgutil.iter_modules(package.__path__):
        if found.name.startswith("_") or found.name == "cli":  # a command, which has its own help
            continue
        module = importlib.import_module(f"lightning_revflip.{found.name}")
        for name in getattr(module, "__all__", None) or defined_names(module):
            names[f"{module.__name__}.{name}"] = getattr(module, name)
    return names


def defined_names(module: ModuleType) -> list[str]:
    """Public classes and functions that a module without `__all__` defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def missing_names(site: Path) -> list[str]:
    """Public names that the inventory of the reference lacks.

    A function with the name of the file that defines it is listed under the latter:
    `flipout.sampling.sampling` for `flipout.sampling`.
    """
    *_, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    documented = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    return [
        f"reference: {name} is missing"
        for name, value in sorted(public_names().items())
        if documented.isdisjoint({name, defined_as(value)})
    ]


def defined_as(value: Any) -> str:
    """Dotted name under which a class or function is defined, `.` for plain values."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address at which the site is served on this machine meanwhile."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser with an empty profile that logs what it asks the network for.

    Raises:
        BrowserError: if Chromium or its driver is not here, or does not start.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        raise BrowserError("no Chromium with chromedriver")
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=driver)
        try:
            window = webdriver.Chrome(options=options, service=service)
        except WebDriverException as error:
            raise BrowserError(f"Chromium does not start: {error.msg}") from error
        try:
            yield window
        finally:
            window.quit()


def requested(window: Any) -> set[str]:
    """Addresses asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in window.get_log("performance")]
    sent = [note["params"] for note in messages if note["method"] == "Network.requestWillBeSent"]
    return {params["request"]["url"] for params in sent}


def logged(window: Any, address: str) -> list[str]:
    """Errors on the console and requests to elsewhere since the last call."""
    allowed = (address, "data:", "blob:", "chrome", "about:")
    elsewhere = sorted(url for url in requested(window) if not url.startswith(allowed))
    errors = [entry["message"] for entry in window.get_log("browser") if entry["level"] == "SEVERE"]
    return errors + [f"asks for {url}" for url in elsewhere]


def broken_pages(site: Path, window: Any, screenshots: Path | None = None) -> list[str]:
    """What is wrong with the pages as a browser shows them."""
    problems = []
    with served(site) as address:
        for path in sorted(site.rglob("*.html")):
            name = path.relative_to(site).as_posix()
            window.get(address + name)
            found = [*window.execute_script(BROKEN), *logged(window, address)]
            if name in WITH_FIGURES and not window.execute_script(FIGURES):
                found.append("no figure")
            problems += [f"{name}: {problem}" for problem in found]
            if screenshots:
                take_screenshots(window, screenshots / name.replace("/", "-"))
        time.sleep(0.5)  # the browser's log may lag behind
        problems += [f"last pages: {problem}" for problem in logged(window, address)]
    return problems


def search_from_disk(site: Path, window: Any) -> list[str]:
    """Whether search finds a page where a browser allows neither workers nor to fetch files."""
    from selenium.common.exceptions import ElementNotInteractableException, TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(window, 60, ignored_exceptions=[ElementNotInteractableException])
    window.get((site / "index.html").as_uri())
    window.execute_script("document.querySelector('#__search').click()")
    box = window.find_element("css selector", "input.md-search__input")
    try:
        waiting.until(lambda _: box.send_keys("flipout") is None)  # once it has opened
        waiting.until(lambda _: window.find_elements("css selector", ".md-search-result__item"))
    except TimeoutException:
        return ["search from the disk: finds nothing"]
    return []


def take_screenshots(window: Any, path: Path) -> None:
    """The whole page in light and in dark colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height = window.execute_script("return document.documentElement.scrollHeight")
    window.set_window_size(1400, min(height + 150, 12_000))
    for scheme in ("light", "dark"):
        wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
        window.execute_script("localStorage.clear()")  # of the colours chosen before
        window.refresh()
        window.save_screenshot(str(path.with_suffix(f".{scheme}.png")))
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    window.set_window_size(1400, 1000)


def main(argv: list[str] | None = None) -> None:
    """Check a site and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, nargs="?", default=Path("site"))
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of all pages")
    options = parser.parse_args(argv)
    if not (options.site / "index.html").exists():
        sys.exit(f"{options.site} is not a built site. Run `make docs` first.")

    site = options.site.resolve()
    problems = broken_links(site) + missing_names(site)
    try:
        with chromium() as window:
            problems += broken_pages(site, window, options.screenshots)
            problems += search_from_disk(site, window)
    except BrowserError as error:
        print(f"pages in a browser: skipped: {error}")
    for problem in problems:
        print(problem)
    pages = len(list(site.rglob("*.html")))
    print(f"{pages} pages, {len(public_names())} public names, {len(problems)} problems")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
