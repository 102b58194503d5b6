"""What mkdocs needs beyond mkdocs.yml: pages made of other files, docstrings as Markdown, formulas as MathML.

Formulas become MathML while the site is built, so that no page loads a script or a font from another server.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import xent

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    ".github/CONTRIBUTING.md": "contributing.md",
    ".github/CHANGELOG.md": "changelog.md",
}
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
INLINE_CODE = re.compile(r"(?<!<pre><code>)(?<=<code>)[^<]+(?=</code>)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The addresses of the site and of the source stand in pyproject.toml, for a package index, and nowhere else."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    addresses = dict(re.findall(r'^(Documentation|Source) = "(.+)"$', project, re.MULTILINE))
    config.site_url = addresses["Documentation"]
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": addresses["Source"], "name": "Source"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """README as the first page, the files beside this folder, and the API reference."""
    for source, page in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        for other, its_page in ELSEWHERE.items():
            text = text.replace(f"]({other})", f"]({its_page})")
        files.append(File.generated(config, page, content=text.replace("](.github/docs/", "](")))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def reference() -> str:
    """Every public name of the package, and the integrations'."""
    names = [f"xent.{name}" for name in sorted(xent.__all__, key=str.lower) if not name.startswith("_")]
    names.append("xent.integrations.transformers.use_xent")
    return "# API reference\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"


def plain(text: str) -> str:
    """A docstring's roles and formulas as Markdown; a name of this package becomes a link."""
    text = ROLE.sub(link, text)
    text = re.sub(r":math:`([^`]+)`", lambda found: f"${found[1]}$", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # reStructuredText's sign of a literal block
    text = re.sub(r"\.\. math:: ((.+\n)+)", lambda found: f"$${found[1].strip()}$$\n", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # as its reader calls what it knows to be code


def link(role: re.Match[str]) -> str:
    """`xent.name` or `name` of the package, as a link; any other name as code."""
    name = role[1].removeprefix("xent.")
    return f"[`{role[1]}`][xent.{name}]" if name in xent.__all__ else f"`{role[1]}`"


class Docstrings(griffe.Extension):  # type: ignore[misc] # of a package that mypy does not follow
    """Reads each docstring through `plain`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of `obj`, once."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)


def on_page_content(content: str, **_: Any) -> str:
    """The formulas of a page as MathML; a name of code that is too long breaks behind a dot or an underscore."""

    def formula(found: re.Match[str]) -> str:
        math = convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")
        if unknown := re.search(r">(\\\w+)<", math):
            raise ValueError(f"{found[2]}: expected TeX that latex2mathml knows, got {unknown[1]}")
        math = math.replace("<mi>log</mi>", '<mo lspace="0" rspace="0.167em">log</mo>')  # log x, not logx
        return f'<div class="formula">{math}</div>' if found[1] == "div" else str(math)

    def breakable(found: re.Match[str]) -> str:
        return re.sub(r"(?<=\w)([._(])(?=\w)", r"\1<wbr>", found[0])

    return INLINE_CODE.sub(breakable, FORMULA.sub(formula, content))
