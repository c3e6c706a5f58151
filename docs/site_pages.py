"""MkDocs hook: pages from outside ``docs``, links for a code host and the site, sources for the API pages.

Pages link to files of the repository by relative paths, as a code host expects. Here a link to a page
of the site is turned into that page; a link to any other file becomes the text of the link alone.
"""

import posixpath
import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "serving/default_encoder/MODEL_CARD.md": "model-cards/histoseek-he-small-3.md",
    "serving/tissue_network/MODEL_CARD.md": "model-cards/histoseek-tissue-small.md",
}
SOURCES = ROOT / "build" / "docs-source" / "histoseek"
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_ANOTHER_HOST = re.compile(r"[a-z]+:", re.IGNORECASE)


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package's modules for the API pages: its folder also holds environments, slow to walk."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    packages = [init.parent for init in ROOT.glob("*/__init__.py")]
    for module in [*ROOT.glob("*.py"), *(m for p in packages for m in p.rglob("*.py"))]:
        copy = SOURCES / module.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, copy)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside ``docs``."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with its links pointing into the site."""
    uri = page.file.src_uri
    path = next((p for p, u in OUTSIDE.items() if u == uri), f"docs/{uri}")

    def in_site(link: re.Match[str]) -> str:
        if _ANOTHER_HOST.match(link["path"]):
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link["path"]))
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{path} links to {link['path']}, which does not exist")
        there = OUTSIDE.get(target, target.removeprefix("docs/"))
        if target not in OUTSIDE and not target.startswith("docs/"):
            return link["text"][1:-1]
        relative = posixpath.relpath(there, posixpath.dirname(uri) or ".")
        return f"{link['text']}({relative}{link['anchor'] or ''})"

    return _LINK.sub(in_site, markdown)
