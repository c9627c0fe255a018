"""What the documentation says is there: links, commands, recipes that can be copied, messages."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from smol_post import commands, loading, schema
from smol_post.__main__ import COMMANDS
from tools import keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```yaml\n# file: (\S+)\n(.*?)^```$", re.M | re.S)
FOLDERS = sorted({str(Path(name).parent) for page in PAGES for name, _ in BLOCK.findall(page.read_text())})
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def slug(heading: str) -> str:
    """The anchor that a heading gets: `## stage: sft` -> stage-sft."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return {slug(line) for line in re.findall(r"^#+ (.*)$", text, re.M)}


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_every_command_that_is_shown_exists(page: Path) -> None:
    shown = re.findall(r"smol-post ([a-z][a-z-]+)", page.read_text())
    assert [name for name in shown if name not in COMMANDS] == []
    targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*|\$\(STAGES\)):", (ROOT / "Makefile").read_text(), re.M)
    known = {name for line in targets for name in line.split()} | set(
        re.findall(r"^STAGES := (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()
    )
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.M | re.S))
    made = re.findall(r"^make ([a-z-]+)", blocks, re.M) + re.findall(r"`make ([a-z-]+)`", page.read_text())
    assert set(made) <= known


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    assert [
        page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index
    ] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_recipes_of_the_documentation_can_be_copied_and_checked(folder: str, tmp_path: Path) -> None:
    validator = Draft202012Validator(schema.tree())
    for page in PAGES:
        for name, text in BLOCK.findall(page.read_text()):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    for path in (tmp_path / folder).glob("*.yaml"):
        assert not list(validator.iter_errors(loading.read_yaml(path))), path
    if (tmp_path / folder / "pipeline.yaml").exists():
        assert commands.check([str(tmp_path / folder)]) == 0
    else:
        for path in (tmp_path / folder).glob("*.yaml"):
            assert commands.check([str(path)]) == 0


@cache
def said() -> str:
    """Every text of the package, pieces of an f-string joined by a star."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "*"

    trees = [ast.parse(path.read_text()) for path in (ROOT / "smol_post").glob("*.py")]
    return "\n".join(
        text(node)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )


def test_every_message_that_troubleshooting_explains_is_said_somewhere() -> None:
    lines = (ROOT / "docs/troubleshooting.md").read_text().split("## While it trains")[0].splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    quoted = [one.replace("\\|", "|") for cell in cells for one in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 20
    assert [one for one in quoted if one not in said()] == []


def test_the_keys_page_has_each_class() -> None:
    page = keys.page(schema.tree())
    assert all(f"\n## {name}\n" in page for name in ("Source", "Peft", "Probe", "Harness", "SFTConfig"))
