"""All regular expressions of the package take linear time.

Expressions meet text that others wrote: one that tries again from every place, or that splits a
run between two quantifiers in every way, lets a line of some KB take minutes.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import itertools
import pkgutil
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from types import ModuleType
from typing import Any, TypeAlias

import pytest

import tdxtrace

# What an expression may meet.  A class is stood for by those of these that are in it.
ALPHABET = " \t\n0a1bA_.-:/,;=()[]{}<>#*+|@$!\"'~x"
N_PUMPS = 6
"""Of each class so many are tried: those that most other classes of the expression have too."""
# Slowly at first: some expressions take twice as long with each character more.  At last twice
# the longest line that is matched.
LENGTHS = (16, 24, 32, 64, 256, 1024, 4096, 16384)
HARMLESS_S = 0.005
"""So little says nothing; a linear expression does not take it, a quadratic one does."""
MAX_RATIO = 8
"""Of the times for a text and for a quarter of it: 4 if linear, 16 if quadratic."""
N_TRIES = 3
"""An expression is too slow if it is each time: the machine may have been busy."""
ENDS = ("", "\x01", "\n ", "\nx")

Pattern = re.Pattern[str] | re.Pattern[bytes]
# What the parser of re makes of one, which has no types.
Parsed: TypeAlias = Any


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(tdxtrace.__path__, "tdxtrace.")
    return [importlib.import_module(m.name) for m in found if not m.name.endswith("__main__")]


def compiled(value: object, depth: int = 0) -> Iterator[Pattern]:
    """Every compiled expression in a value, however deep."""
    if isinstance(value, re.Pattern):
        yield value
    elif depth < 5:
        for part in _parts(value):
            yield from compiled(part, depth + 1)


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (tuple, list, set, frozenset)):
        return value
    if isinstance(value, type):
        return list(vars(value).values()) if value.__module__.startswith("tdxtrace.") else ()
    if dataclasses.is_dataclass(value):
        return [getattr(value, column.name, None) for column in dataclasses.fields(value)]
    return ()


class Names(dict[str, Any]):
    """What the names in an expression's text stand for: some word, if no constants."""

    def __init__(self, module: ModuleType, word: str | bytes) -> None:
        super().__init__(vars(module))
        self.word = word

    def __missing__(self, name: str) -> str | bytes:
        return self.word


def written(module: ModuleType) -> Iterator[Pattern]:
    """The expressions that a module hands to functions of re, as far as they are written there."""
    assert module.__file__ is not None
    with open(module.__file__, encoding="utf-8") as file:  # noqa: PTH123
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        is_of_re = isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
        if not is_of_re or node.func.attr == "escape":
            continue
        flags = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr.isupper()]
        text = _value(node.args[0], module)
        if isinstance(text, (str, bytes)):
            yield re.compile(text, sum(getattr(re, flag.attr) for flag in flags))


def _value(node: ast.expr, module: ModuleType) -> object:
    try:
        return eval(ast.unparse(node), {}, Names(module, "word"))
    except TypeError:
        return eval(ast.unparse(node), {}, Names(module, b"word"))


def expressions() -> dict[str, list[Pattern]]:
    """Of each module its expressions; one that several have is found in the first of them."""
    seen: set[Pattern] = set()
    found: dict[str, list[Pattern]] = {}
    for module in modules():
        for pattern in itertools.chain(written(module), compiled(dict(vars(module)))):
            if pattern not in seen:
                found.setdefault(module.__name__, []).append(pattern)
                seen.add(pattern)
    return found


@dataclasses.dataclass
class Attacks:
    """Texts of the form ``before + pump * n``, made from what an expression is made of."""

    pattern: Pattern
    seen: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    members: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    classes: list[Any] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        text = self.pattern.pattern
        source = text if isinstance(text, str) else text.decode("latin-1")
        flags = self.pattern.flags & ~re.UNICODE & ~re.ASCII
        tree = _parser.parse(source, flags)
        self.state = tree.state
        self.state.flags = flags
        self._find_classes(tree)
        for takes_options in (False, True):
            self._walk(tree, "", takes_options)
        for char in ALPHABET:
            self._add("", char)

    def _find_classes(self, tree: Parsed) -> None:
        for op, value in tree:
            if op in (_constants.IN, _constants.ANY, _constants.NOT_LITERAL):
                self.classes.append((op, value))
            for inner in _children(op, value):
                self._find_classes(inner)

    def _in(self, item: Parsed) -> list[str]:
        """The characters of the alphabet that are in a class, the commonest first."""
        key = repr(item)
        if key not in self.members:
            made = _compiler.compile(_parser.SubPattern(self.state, [item]), self.state.flags)
            self.members[key] = [char for char in ALPHABET if made.fullmatch(char)]
        return self.members[key]

    def _pumps(self, item: Parsed) -> list[str]:
        if item[0] not in (_constants.IN, _constants.ANY, _constants.NOT_LITERAL):
            return [self._sample([item], True), self._sample([item], False)]
        shared = {c: sum(c in self._in(other) for other in self.classes) for c in ALPHABET}
        return sorted(self._in(item), key=lambda c: -shared[c])[:N_PUMPS]

    def _sample(self, tree: Parsed, takes_options: bool) -> str:
        """A text that some items match."""
        made = ""
        for op, value in tree:
            if op is _constants.LITERAL:
                made += chr(value)
            elif op in (_constants.IN, _constants.ANY, _constants.NOT_LITERAL):
                made += (self._in((op, value)) or [""])[0]
            elif op in _REPEATS:
                least, most, inner = value
                times = max(least, min(int(takes_options), int(most)))
                made += self._sample(inner, takes_options) * min(times, 20)
            elif op is _constants.BRANCH:
                made += self._sample(value[1][-1 if takes_options else 0], takes_options)
            elif op in _GROUPS or _is_behind(op, value):
                made += self._sample(_children(op, value)[0], takes_options)
        return made

    def _walk(self, tree: Parsed, before: str, takes_options: bool) -> None:
        for index, (op, value) in enumerate(tree):
            if op in _REPEATS and value[1] > 1:
                for item in list(value[2]):
                    for pump in self._pumps(item):
                        self._add(before, pump)
                self._add(before, self._sample(value[2], takes_options))
            for inner in _children(op, value):
                self._walk(inner, before, takes_options)
            before += self._sample([tree[index]], takes_options)
            self._add("", before)
            self._add(before, self._sample([tree[index]], takes_options))

    def _add(self, before: str, pump: str) -> None:
        if pump:
            self.seen.add((before, pump))


_GROUPS = (_constants.SUBPATTERN, _constants.ATOMIC_GROUP)
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


def _is_behind(op: Parsed, value: Parsed) -> bool:
    return op is _constants.ASSERT and value[0] < 0


def _children(op: Parsed, value: Parsed) -> list[Any]:
    if op in _REPEATS:
        return [value[2]]
    if op is _constants.BRANCH:
        return list(value[1])
    if op is _constants.SUBPATTERN:
        return [value[3]]
    if op is _constants.ATOMIC_GROUP:
        return [value]
    if op in (_constants.ASSERT, _constants.ASSERT_NOT):
        return [value[1]]
    return []


def texts(pattern: Pattern) -> Iterator[Callable[[int], str]]:
    """Functions that make a text of a given length that may take an expression long."""

    def maker(before: str, pump: str, end: str) -> Callable[[int], str]:
        return lambda n: before + pump * (max(0, n - len(before)) // len(pump)) + end

    for before, pump in sorted(Attacks(pattern).seen):
        for end in ENDS:
            yield maker(before, pump, end)


def seconds(pattern: Pattern, text: str, n: int = 1) -> float:
    """The time of this thread that finding all matches takes; the least of ``n``."""
    search: Any = pattern.finditer
    given = text if isinstance(pattern.pattern, str) else text.encode("latin-1")
    least = float("inf")
    for _ in range(n):
        begun = time.thread_time()
        for _found in search(given):
            pass
        least = min(least, time.thread_time() - begun)
    return least


def worst(pattern: Pattern) -> str:
    """The text that takes an expression too long, shortened; empty if none does."""
    for make in texts(pattern):
        for length in LENGTHS:
            text = make(length)
            once = seconds(pattern, text)
            # Were it quadratic, the longest text would be harmless as well.
            if length >= 1024 and once * (LENGTHS[-1] / length) ** 2 < HARMLESS_S:
                break
            if once < HARMLESS_S:
                continue
            for _ in range(N_TRIES):
                times = seconds(pattern, text, 5), seconds(pattern, make(length // 4), 5)
                if not _is_slow(times):
                    break
            else:
                return f"{make(32)!r} at {length}: {times[0]:.4f} s, at a quarter {times[1]:.4f} s"
    return ""


def _is_slow(times: tuple[float, float]) -> bool:
    return times[0] > HARMLESS_S and times[0] > MAX_RATIO * times[1]


EXPRESSIONS = expressions()


def test_the_expressions_are_found() -> None:
    assert sum(len(patterns) for patterns in EXPRESSIONS.values()) > 150


@pytest.mark.parametrize("bad", [r"\s*\s*x", r"(a|a)*b", r"\w+:", "tdx: .*module", r"a.*?,.*?;$"])
def test_a_bad_expression_is_detected(bad: str) -> None:
    assert worst(re.compile(bad))


@pytest.mark.parametrize("module", EXPRESSIONS)
def test_expressions_are_linear(module: str) -> None:
    """However they are called: also searched for, and from every place."""
    found = {pattern.pattern: worst(pattern) for pattern in EXPRESSIONS[module]}
    assert not {pattern: text for pattern, text in found.items() if text}
