"""What the documents say is true: examples run, commands agree, the flow of imports is held, nothing is left out."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import xent

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "xent"
README = ROOT / "README.md"
COMMANDS = (
    "pip install -e '.[bench]' && python benchmarks/train.py --quick",
    "pip install -e '.[test]' && python -m pytest",
)
# Backends that a machine may lack are in test_backends.py.
MODULES = sorted(
    {
        "xent",
        *(m.name for m in pkgutil.iter_modules([str(PACKAGE)], "xent.")),
        "xent._backends.eager",
        "xent.integrations._head",
    }
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name: str) -> None:
    """Every public function and class has an example, and it runs."""
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    if name in ("xent.functional", "xent.modules"):
        assert result.attempted >= 5


def readme_blocks() -> list[str]:
    """The Python blocks of the README, in order; each is run by one of the next two tests."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_before_and_after() -> None:
    """Its first block, within the first ten lines, is two lines of code that give the same number."""
    assert "```python" in README.read_text(encoding="utf-8").split("\n\n")[1]
    torch.manual_seed(0)
    names = {"F": F, "xent": xent, "logits": torch.randn(2, 3, 5), "targets": torch.randint(5, (2, 3))}
    losses = []
    for line in readme_blocks()[0].strip().splitlines():
        exec(line, names)
        losses.append(names["loss"])
    assert len(losses) == 2
    torch.testing.assert_close(*losses)


def check_examples(file: Path, blocks: list[str]) -> None:
    """Blocks of examples with their output, in one session."""
    names: dict[str, object] = {}
    runner = doctest.DocTestRunner()
    for number, block in enumerate(blocks, 1):
        assert ">>>" in block, f"block {number} of these would not be run"
        test = doctest.DocTestParser().get_doctest(block, names, f"{file.name}, block {number}", str(file), 0)
        runner.run(test, clear_globs=False)
        names = test.globs
    assert runner.tries >= 2
    assert runner.failures == 0


def test_readme_examples() -> None:
    assert len(readme_blocks()) == 4
    check_examples(README, readme_blocks()[1:])


PAGES = sorted((ROOT / ".github" / "docs").glob("*.md"))
WITHOUT_EXAMPLES = {"not.md", "performance.md", "support.md"}


@pytest.mark.parametrize(
    "file", [page for page in PAGES if page.name not in WITHOUT_EXAMPLES], ids=lambda file: file.name
)
def test_examples_of_pages(file: Path) -> None:
    if file.name == "transformers.md":
        pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    check_examples(file, blocks)


@pytest.mark.parametrize("name", sorted(WITHOUT_EXAMPLES))
def test_pages_without_examples_have_none(name: str) -> None:
    assert "```python" not in (ROOT / ".github" / "docs" / name).read_text(encoding="utf-8")


def test_readme_is_short_and_its_figures_are_those_of_the_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 130
    rows = re.findall(r"^\| .*?\d\.\d\d \|.*$", text, re.MULTILINE)
    assert len(rows) >= 5
    measured = (ROOT / ".github" / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    assert set(rows) <= set(measured)


@pytest.mark.parametrize("file", [README, *PAGES, ROOT / ".github" / "CONTRIBUTING.md"], ids=lambda file: file.name)
def test_links_lead_to_files_of_a_checkout(file: Path) -> None:
    """And to headings; the site's own build looks at the same links once more, as links between its pages."""
    for link in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    ):
        name, _, heading = link.partition("#")
        if "://" not in link:
            page = file.parent / name if name else file
            assert page.is_file(), link
            assert not heading or heading in headings(page), link


def headings(page: Path) -> set[str]:
    """The anchors that GitHub and the site give a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_readme_and_ci_hold_the_same_commands(file: str, command: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert command in [line.strip() for line in lines]
    here = [line.strip() for line in lines if line.strip().startswith("pip install -e")]
    assert set(here) <= {*COMMANDS, "pip install -e '.[dev]'"}, "a third way to set up"


# The flow

FLOW = [  # a file imports only from lines below its own
    {"__main__"},
    {"__init__"},
    {"modules"},
    {"linear"},
    {"functional"},
    {"_ranks.head", "_ranks.dtensor"},
    {"_ranks.functions"},
    {"_ranks.combine"},
    {"_ranks.exchange"},
    {"_head.functions"},
    {"_head.entries"},
    {"_head.blocks"},
    {"_head.products"},
    {"_rows.loss"},
    {"_rows.functions"},
    {"_rows.derivatives", "_rows.operators", "_rows.objective"},
    {"_rows.dispatch"},
    {"_rows.candidates"},
    {"_inputs.head"},
    {"_inputs.rows", "_inputs.options"},
    {"_backends"},
    {"_records", "_torch"},
]
RANK = {name: rank for rank, names in enumerate(FLOW) for name in names}
ROOMS = ("_ranks", "_head", "_rows", "_inputs")
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
INTEGRATIONS = [file for file in FILES if file.startswith("integrations/")]


def imported(file: str) -> set[str]:
    """The modules of the package that a file imports, by their names in it; "" is the package itself."""
    found, room = set(), file.split("/")[:-1]
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "xent" for alias in node.names), "imports here are relative"
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "xent", "imports here are relative"
            if node.level:
                start = room[: len(room) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
                # `from .room import file` names a file; `from .room.file import name` and `from .file import name` too.
                whole = ".".join(start)
                found |= {f"{whole}.{a.name}".lstrip(".") if whole in ("", *ROOMS) else whole for a in node.names}
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file.removesuffix(".py").replace("/", ".") in RANK])
def test_imports_go_down(file: str) -> None:
    own = RANK[file.removesuffix(".py").replace("/", ".")]
    for name in imported(file):
        assert RANK.get(name, RANK["__init__"]) > own, f"{file} imports {name}"


def test_every_file_has_its_floor() -> None:
    rooms = [file for file in FILES if not file.startswith(("_backends/", "integrations/")) and file != "__init__.py"]
    files = {file.removesuffix(".py").replace("/", ".") for file in rooms if not file.endswith("__init__.py")}
    assert files == set(RANK) - {"__init__", "_backends"}


@pytest.mark.parametrize("file", INTEGRATIONS)
def test_integrations_stand_on_the_public_face(file: str) -> None:
    assert imported(file) <= {"functional", "linear", "integrations._head"}


@pytest.mark.parametrize("file", [file for file in FILES if file not in INTEGRATIONS])
def test_nothing_imports_an_integration(file: str) -> None:
    assert "integrations" not in (PACKAGE / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("_backends/")])
def test_backends_import_only_what_they_share(file: str) -> None:
    own = file.split("/")[1].removesuffix(".py")
    allowed = {"_records", "_torch"} | ({"_backends"} if own != "__init__" else set())
    assert {name for name in imported(file) if not name.startswith(f"_backends.{own}")} <= allowed


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_a_few_pages(file: str) -> None:
    text = (PACKAGE / file).read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    assert ast.get_docstring(ast.parse(text)), "it begins with what it is"


# Public names


def test_public_names() -> None:
    assert set(xent.__all__) == {
        "CrossEntropyLoss",
        "LinearCrossEntropyLoss",
        "TokenStats",
        "__version__",
        "cross_entropy",
        "linear_cross_entropy",
        "linear_token_stats",
        "token_stats",
    }
    public = {name for name, value in vars(xent).items() if not (name.startswith("_") or inspect.ismodule(value))}
    assert public == set(xent.__all__) - {"__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", xent.__version__)


PUBLIC = sorted(set(xent.__all__) - {"TokenStats", "__version__"})


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_name_the_unit(name: str) -> None:
    """What else they need is in build.py, and tested in test_reference_pages.py."""
    assert re.search(r"\bnats\b", getattr(xent, name).__doc__)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_name_every_argument(name: str) -> None:
    function = getattr(xent, name)
    code = function.__init__ if isinstance(function, type) else function
    for argument in code.__annotations__.keys() - {"return"}:
        assert re.search(rf"^ +(\w+, )*{argument}(,|:)", function.__doc__, re.MULTILINE), argument


def test_token_stats_fields_are_documented() -> None:
    assert xent.TokenStats.__doc__
    assert "nats" in xent.TokenStats.__doc__
    for field in xent.TokenStats._fields:
        assert field in (xent.token_stats.__doc__ or "")


def test_the_versions_of_torch_are_stated_once() -> None:
    """CI's matrix holds the floor of pyproject.toml and the release that the extras pin, and the README the floor."""
    project, workflow = (ROOT / "pyproject.toml").read_text(), (ROOT / ".github/workflows/ci.yml").read_text()
    floor, pinned = re.search(r'"torch>=([\d.]+)"', project), set(re.findall(r'"torch==([\d.]+)"', project))
    matrix = re.search(r"torch: \[(.*?)\]", workflow)
    assert floor is not None
    assert matrix is not None
    assert re.findall(r'"([\d.]+)"', matrix[1]) == [f"{floor[1]}.0", *pinned]
    assert f"torch {floor[1]}" in (ROOT / "README.md").read_text()
