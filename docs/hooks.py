"""What MkDocs is told beside mkdocs.yml: pages made of other files, and links out of docs/.

The API's pages follow from the names that modules offer, which are read and not imported: neither
torch nor fastattn need be installed.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages that lie outside docs/, and what they are called on the site."""

MODULES = {
    "fastattn": ("fastattn/ops/public.py", "fastattn/__init__.py"),
    "fastattn.nn": ("fastattn/nn/__init__.py",),
    "fastattn.functional": ("fastattn/functional/__init__.py",),
    "fastattn.losses": ("fastattn/losses/__init__.py",),
    "fastattn.models": ("fastattn/models/__init__.py",),
    "fastattn.generation": ("fastattn/generation/__init__.py",),
    "fastattn.patching": ("fastattn/patching/__init__.py",),
    "fastattn.terms": ("fastattn/terms.py",),
    "fastattn.integrations.transformers": ("fastattn/integrations/transformers/__init__.py",),
    "fastattn.integrations.flash_attn": ("fastattn/integrations/flash_attn/__init__.py",),
}
"""Modules with a page of the API, and the files that list their names."""

UNREAD = {"MaskFunctions", "Place", "ScoreFunctions"}
"""Names of kernels/, which is no package, so that its docstrings are not found."""


def public_names(path: str) -> list[str]:
    """What a file offers: the names in `__all__`, and those imported as themselves."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(node.value, ast.List):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if getattr(target, "id", None) == "__all__":
                names += [getattr(element, "value", "") for element in node.value.elts]
    return sorted({name for name in names if name and not name.startswith("_")}, key=str.lower)


def model_names() -> list[str]:
    """The heads of every family, with the module that each is in."""
    paths = sorted((ROOT / "fastattn" / "models").glob("[a-z]*.py"))
    classes = re.compile(r"^class ([A-Z]\w+(?:Model|For[A-Z]\w+))\(", flags=re.MULTILINE)
    return [f"{path.stem}.{name}" for path in paths for name in classes.findall(path.read_text())]


def on_files(files: Files, config: Any) -> Files:
    """Add what is made of other files."""
    made = {name: (ROOT / source).read_text() for source, name in OUTSIDE.items()}
    for path in sorted((ROOT / "docs" / "examples").glob("*.py")):
        made[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```python\n{path.read_text()}```\n"
    for module, sources in MODULES.items():
        names = [name for source in sources for name in public_names(source)]
        known = {path.split(".")[-1] for path in MODULES} | {"integrations"}
        names = [name for name in names if name not in known | UNREAD]
        names += model_names() if module == "fastattn.models" else []
        parts = [f"::: {module}.{name}\n" for name in names]
        made[f"api/{module}.md"] = "\n".join([f"# {module}\n", *parts])
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Make links lead to pages of the site, or to the repository where its address is known."""
    # Badges are for where the repository is shown: a page of the site asks no other server.
    markdown = re.sub(
        r"^!\[.*\]\(https://img\.shields\.io/.*\)\n", "", markdown, flags=re.MULTILINE
    )
    source = {name: path for path, name in OUTSIDE.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(source if source else f"docs/{page.file.src_uri}")

    def lead(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        name = OUTSIDE.get(path, path.removeprefix("docs/"))
        if name.startswith("examples/"):
            name = name.removesuffix(".py") + ".md" if name.endswith(".py") else name
        if name != path or path in OUTSIDE:
            start = posixpath.dirname(page.file.src_uri) or "."
            return f"[{text}]({posixpath.relpath(name, start)}{anchor})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return text

    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    pattern = r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*|)\)"
    pieces[::2] = (re.sub(pattern, lead, piece) for piece in pieces[::2])
    return "".join(pieces)
