"""The structure of the package: imports, docstrings, schemas, paths in pyproject.toml."""

import ast
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tdxtrace
from tdxtrace.tables.catalog import TABLES
from tdxtrace.tables.contract import REPORT, render, render_report

PACKAGE = Path(tdxtrace.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself and the rooms named here; nothing else of tdxtrace.
FACTS = {"errors", "tdx", "tables", "compiler"}
ROOMS = {"ingest", "analysis", "report"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "compiler": set(),
    "tdx": set(),
    "tables": {"errors", "tdx"},
    "intervals": set(),
    **dict.fromkeys(ROOMS, FACTS),
    "analysis": FACTS | {"intervals"},
    "recommend": FACTS | {"intervals"},
    "simulate": {"errors", "tables"},
    "capture": FACTS,
    "watch": FACTS | {"ingest", "analysis"},
    "pipeline": FACTS | {"analysis", "recommend"},
    "fleet": FACTS | {"intervals", "ingest", "analysis", "recommend", "pipeline"},
    "validate": FACTS | ROOMS | {"pipeline", "recommend", "simulate"},
    "cli": FACTS
    | ROOMS
    | {"capture", "watch", "fleet", "pipeline", "recommend", "simulate", "validate"},
}
# Names of tdxtrace itself that any module may import, with the reason.
NAMES_FOR_ALL = {"__version__": "a constant of tdxtrace/__init__.py, which imports no room"}
# Modules that import tdxtrace itself, and thereby may reach any room, with the reason.
IMPORT_TDXTRACE = {
    "tables/trace.py": "Trace.sql calls tdxtrace.query, so that tables does not depend on pipeline",
}
# Circles of imports that are still there, by their modules. Remove an entry with its circle;
# add none: move what both modules need into a third.
KNOWN_CIRCLES: set[frozenset[str]] = set()
# A package of the simulator may import itself, those named before it, and modules of no package.
SIMULATOR = ("module", "host", "guest", "kvm", "record")
MAX_FUNCTION_LINES = 40


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TEXTS = {_dotted(path): path.read_text("utf-8") for path in MODULES}


def _room(module: str) -> str:
    return module.split(".")[1]


def _from_package(name: str) -> set[str]:
    """The modules that ``from tdxtrace import NAME`` imports."""
    if f"tdxtrace.{name}" in TEXTS:
        return {f"tdxtrace.{name}"}
    return set() if name in NAMES_FOR_ALL else {tdxtrace._HOMES.get(name, "tdxtrace")}


def _imported(text: str) -> set[str]:
    """The modules of tdxtrace that a module of this ``text`` imports anywhere.

    At its top, in functions and in TYPE_CHECKING blocks: two modules that need each other's
    types cannot be understood one without the other, whatever runs. ``tdxtrace`` stands for
    the package itself. The packages that hold an imported module are not counted.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if node.module == "tdxtrace":
                    found |= _from_package(alias.name)
                else:
                    found.add(name if name in TEXTS else str(node.module))
    return {name for name in found if name.split(".")[0] == "tdxtrace"}


def _circles(imports: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of modules of which each reaches each other one by imports."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            new = imports.get(left.pop(), set()) - seen
            seen |= new
            left += new
        return seen

    reach = {module: reached(module) for module in imports}
    return {
        frozenset(other for other in reach[module] if module in reach.get(other, ()))
        for module in imports
        if module in reach[module]
    }


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("import tdxtrace", {"tdxtrace"}),
        ("def f():\n    import tdxtrace as t", {"tdxtrace"}),
        ("def f():\n    from tdxtrace import *", {"tdxtrace"}),
        ("def f():\n    from tdxtrace import query", {"tdxtrace.pipeline"}),
        ("from tdxtrace import __version__, pipeline", {"tdxtrace.pipeline"}),
        (
            "if TYPE_CHECKING:\n    from tdxtrace.tables.trace import Trace",
            {"tdxtrace.tables.trace"},
        ),
        ("from tdxtrace.tables import trace", {"tdxtrace.tables.trace"}),
        ("import polars, tdxtrace.errors", {"tdxtrace.errors"}),
        ("from tdxtrace import __version__\nimport tdxtracer", set()),
    ],
)
def test_every_form_of_import_is_seen(text: str, imported: set[str]) -> None:
    assert _imported(text) == imported


def test_circles_are_found() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d", "x"}, "f": {"f"}}
    assert _circles(imports) == {frozenset("bc"), frozenset("de"), frozenset("f")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    module = _dotted(path)
    if path.parent == PACKAGE and path.name.startswith("__"):
        return
    imported = _imported(TEXTS[module])
    listed = str(path.relative_to(PACKAGE)) in IMPORT_TDXTRACE
    if "tdxtrace" in imported:
        assert listed, "imports tdxtrace itself, from where any room is reached"
    else:
        assert not listed, "remove from IMPORT_TDXTRACE: it does not import tdxtrace itself"
    room = _room(module)
    strays = {_room(name) for name in imported - {"tdxtrace"}} - MAY_IMPORT[room] - {room}
    assert not strays, f"{room} may not import {sorted(strays)}"


def test_rooms_do_not_import_in_a_circle() -> None:
    tuple(TopologicalSorter(MAY_IMPORT).static_order())  # CycleError


def test_modules_of_a_room_do_not_import_in_a_circle() -> None:
    """Between rooms there is no circle by MAY_IMPORT; within a room there is none either."""
    modules = {m: _imported(text) - {"tdxtrace"} for m, text in TEXTS.items() if m != "tdxtrace"}
    inside = {m: {n for n in names if _room(n) == _room(m)} for m, names in modules.items()}
    found = _circles(inside)
    new, gone = found - KNOWN_CIRCLES, KNOWN_CIRCLES - found
    edges = [f"{a} -> {b}" for c in new for a in sorted(c) for b in sorted(inside[a] & c)]
    shorter = [known for known in KNOWN_CIRCLES if any(circle < known for circle in new)]
    assert not shorter, f"shorten in KNOWN_CIRCLES, part of it is no circle any more: {shorter}"
    assert not new, "modules import each other in a circle: " + ", ".join(edges)
    assert not gone, f"remove from KNOWN_CIRCLES, it is no circle any more: {gone}"


@pytest.mark.parametrize("package", SIMULATOR)
def test_the_packages_of_the_simulator_are_layers(package: str) -> None:
    later = tuple(f"tdxtrace.simulate.{n}." for n in SIMULATOR[SIMULATOR.index(package) + 1 :])
    modules = [m for m in TEXTS if m.startswith(f"tdxtrace.simulate.{package}.")]
    assert modules
    for module in modules:
        strays = {name for name in _imported(TEXTS[module]) if f"{name}.".startswith(later)}
        assert not strays, f"{module} may not import {sorted(strays)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_functions_have_docstrings_and_functions_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), "no module docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in [*tree.body, *(member for owner in classes for member in owner.body)]:
        if isinstance(node, ast.FunctionDef):
            body = [s for s in node.body if not isinstance(s, ast.Expr) or s is not node.body[0]]
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
            if not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_polars_does_not_expand_paths_as_globs() -> None:
    """polars takes ``*``, ``?`` and ``[`` in a path for a glob unless ``glob=False``."""
    strays = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            call = ast.unparse(node.func)
            result = {word.arg: ast.unparse(word.value) for word in node.keywords}
            # Of the calls that read files, this one opens a single one.
            if call.startswith(("pl.read_", "pl.scan_")) and call != "pl.read_parquet_metadata":
                strays += [f"{path}:{node.lineno}"] if result.get("glob") != "False" else []
    assert not strays


def test_no_module_has_a_meaningless_name() -> None:
    assert not {p.stem for p in MODULES} & {"utils", "helpers", "common", "core", "misc"}


def test_contracts_are_up_to_date() -> None:
    folder = ROOT / "schemas"
    contracts = {table.name: render(table) for table in TABLES} | {REPORT: render_report()}
    assert {p.stem for p in folder.glob("*.json")} == set(contracts)
    for name, contract in contracts.items():
        assert (folder / f"{name}.json").read_text("utf-8") == contract, (
            f"schemas/{name}.json is stale: run python -m tdxtrace.tables.contract; if more than a "
            "description changed, increment SCHEMA_VERSION in tdxtrace/tables/catalog.py first"
        )


def test_public_names_are_few_and_exist() -> None:
    assert len(tdxtrace.__all__) <= 15
    assert all(hasattr(tdxtrace, name) for name in tdxtrace.__all__)


def _paths_in_pyproject() -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    tool, build = project["tool"], project["tool"]["hatch"]["build"]["targets"]
    yield project["project"]["readme"]
    yield from project["project"]["license-files"]
    yield from build["wheel"]["packages"]
    yield from build["sdist"]["include"]
    yield from tool["pytest"]["testpaths"]
    yield from tool["pytest"]["pythonpath"]
    yield from (path for path in tool["pytest"]["norecursedirs"] if "/" in path)
    yield from tool["ruff"]["lint"]["per-file-ignores"]
    yield from tool["mypy"]["files"]
    yield from tool["mypy"]["mypy_path"]


def test_pyproject_names_only_paths_that_exist() -> None:
    missing = [p for p in _paths_in_pyproject() if p != "." and not any(ROOT.glob(p))]
    assert not missing


def test_the_readme_of_shared_test_modules_names_each() -> None:
    folder = ROOT / "tests" / "support"
    rows = [line.split("`") for line in (folder / "README.md").read_text("utf-8").splitlines()]
    named = [row[1] for row in rows if row[0] == "| "]
    assert named == sorted(path.name for path in folder.glob("*.py"))


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for module, text in TEXTS.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}
