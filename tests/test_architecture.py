"""What holds between files: imports, documentation, sizes, and a README that tells the truth."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from navit.__main__ import COMMANDS as NAVIT_COMMANDS
from navit.__main__ import main as navit_main
from navit.embed.command import EmbedCommand
from navit.evaluate.command import EvaluateCommand
from navit.train.config import TrainConfig
from packer.__main__ import COMMANDS as PACKER_COMMANDS
from packer.config import PackerConfig

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("packer/**/*.py"), *ROOT.glob("navit/**/*.py")])
README = ROOT / "README.md"
MAX_LINES = 450

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def test_imports_keep_the_contracts_of_pyproject(tmp_path: Path) -> None:
    # A process of its own: import-linter switches off every logger that exists.
    lint = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--cache-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


# Source files


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield name and node of public functions and classes, and of public methods inside them."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def configurations() -> list[type]:
    """Return every dataclass a user can set: the roots and all that their fields lead to."""
    found: dict[type, None] = {}
    roots = [PackerConfig, TrainConfig, EvaluateCommand, EmbedCommand]
    queue: list[object] = [*roots, *PACKER_COMMANDS.values()]
    while queue:
        kind = queue.pop()
        queue += get_args(kind)
        if isinstance(kind, type) and is_dataclass(kind) and kind not in found:
            found[kind] = None
            queue += get_type_hints(kind).values()
    return sorted(found, key=lambda kind: kind.__name__)


def undocumented_fields(node: ast.ClassDef) -> Iterator[str]:
    """Yield the public fields that no string literal follows."""
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            documented = (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
            if not documented and not statement.target.id.startswith("_"):
                yield statement.target.id


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_thing_of_a_module_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    missing = [name for name, node in public_definitions(tree.body) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), "the module has no docstring"
    assert not missing


@pytest.mark.parametrize("kind", configurations(), ids=lambda kind: kind.__name__)
def test_every_field_of_a_configuration_has_a_line_below_it(kind: type) -> None:
    """It is what `--help` shows, and what the reader of a run's config.json looks up."""
    node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(node, ast.ClassDef)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    described = re.findall(r"^ +(\w+):", (kind.__doc__ or "").partition("Args:")[2], re.MULTILINE)
    assert [field for field in undocumented_fields(node) if field not in described] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_outgrows_what_can_be_read_at_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


# README, CHANGELOG and the command line


def readme_tree() -> dict[str, str]:
    """Return path -> description of the README's layout; a folder's path ends with a slash."""
    block = re.search(r"## Layout\n.*?```text\n(.*?)```", README.read_text(), re.DOTALL)
    assert block, "README.md must have a layout tree in a ```text block"
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        indent = len(line) - len(line.lstrip(" "))
        assert indent % 2 == 0, line
        name, _, description = line.strip().partition(" ")
        parent = "".join(folders[: indent // 2])
        entries[parent + name] = description.strip()
        if name.endswith("/"):
            folders[indent // 2 :] = [name]
    return entries


def test_the_readme_names_only_files_that_exist_with_a_line_each() -> None:
    tree = readme_tree()
    assert [name for name, described in tree.items() if not described] == []
    missing = [
        name
        for name in tree
        if not ((ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file())
    ]
    assert missing == []


def test_the_readme_names_every_module_of_both_packages() -> None:
    modules = {str(path.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py"}
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in SOURCES}
    assert sorted((modules | packages) - readme_tree().keys()) == []


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *map(str, ROOT.glob("docs/*.md"))]
)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    document = ROOT / name
    targets = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_the_readme_shows_every_command() -> None:
    text = README.read_text()
    commands = [f"navit {name}" for name in NAVIT_COMMANDS]
    commands += [f"python -m packer {name}" for name in PACKER_COMMANDS]
    assert [command for command in commands if command not in text] == []


def test_the_console_command_lists_its_commands_with_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["navit", "--help"])
    assert navit_main() == 0
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    for name in NAVIT_COMMANDS:
        assert any(re.match(rf"\s+{name}\s+\S", line) for line in lines), name


def test_every_make_target_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = README.read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(
        re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)
    )
    assert named
    assert sorted(named - targets) == []


def test_the_changelog_starts_with_what_is_not_released() -> None:
    headings = re.findall(r"^##+ .*", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    expected = ["## Unreleased", "### Added", "### Changed", "### Changed numbers", "### Fixed"]
    assert headings[:5] == expected
