"""The map and the recipes for changes name files and tests that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAP = ROOT / "tdxtrace" / "README.md"
RECIPES = ROOT / "CONTRIBUTING.md"
_NAMED = re.compile(r"`([^`\s]+?(?:/|\.(?:py|csv|md|toml|txt)))`")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_INVARIANT = re.compile(r"^\| .* \| `tests/")


def _recipes() -> Iterator[tuple[str, str]]:
    text = RECIPES.read_text("utf-8").partition("## Recipes")[2]
    for part in text.split("\n### ")[1:]:
        title, _, steps = part.partition("\n")
        yield title, steps


@pytest.mark.parametrize(("title", "steps"), list(_recipes()), ids=[t for t, _ in _recipes()])
def test_a_recipe_names_files_that_exist(title: str, steps: str) -> None:
    numbered = [line for line in steps.splitlines() if re.match(r"\d+\. ", line)]
    assert numbered, title
    named = _NAMED.findall(steps)
    assert len(named) >= len(numbered), "each step names what it touches"
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [MAP, RECIPES], ids=lambda page: page.name)
def test_pages_name_files_that_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    places = (ROOT, page.parent, ROOT / "tdxtrace", ROOT / "tdxtrace" / "ingest")
    for name in _NAMED.findall(text) + re.findall(r"\]\(([^):]+)\)", text):
        assert any((place / name).exists() for place in places), name


def test_every_invariant_names_a_test_that_exists() -> None:
    rows = [line for line in MAP.read_text("utf-8").splitlines() if _INVARIANT.match(line)]
    assert len(rows) > 10
    for row in rows:
        for path, name in _TEST.findall(row):
            assert f"def {name}(" in (ROOT / path).read_text("utf-8"), f"{path}::{name}"


def test_the_map_names_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "tdxtrace").glob("*/__init__.py")}
    text = MAP.read_text("utf-8")
    assert not {room for room in rooms if f"`{room}/`" not in text}
