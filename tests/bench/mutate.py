"""Damage inputs for a given time, and keep those that crash a reader.

The longer form of tests/property/test_mutations.py, over recordings, texts, logs of the kernel,
stores and settings; exits with 1 if something was found.

python tests/bench/mutate.py [--minutes 10] [--seed 0] [--only WORD] [--keep FOLDER] [--again FILE]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

# In place of this folder, whose coverage.py numba would take for the package of that name.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parent.parent))
from support import mutated_text as texts
from support.mutations import SEEDS, mutate, survive
from support.running import SAMPLES

import tdxtrace
from tdxtrace.ingest.read import ReadOptions, convert

# Every so many of a kind are read whole: all questions, and both ways to run loops.
_WHOLE: dict[str, int] = {"recording": 200, "text": 200, "dmesg": 1, "store": 10, "settings": 1}
# How often a kind comes: what is slow comes seldom.
_TURNS = {"recording": 40, "text": 40, "dmesg": 1, "store": 2, "settings": 10}

Case = tuple[Path, Callable[[bool], str], Callable[[], None]]
"""What to keep if it is not survived, what must be survived, and what makes room for the next."""


def main() -> None:
    """Damage and read until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="recording, text, dmesg, store or settings")
    parser.add_argument("--keep", type=Path, help="where to keep what is found; default: new")
    parser.add_argument("--again", type=Path, help="only read this file, and show what happens")
    words = parser.parse_args()
    if words.again is not None:
        print(_again(words.again))
        return
    folder = words.keep or Path(tempfile.mkdtemp(prefix="tdxtrace-mutate-"))
    folder.mkdir(parents=True, exist_ok=True)
    ends = _run(words.seed, 60 * words.minutes, words.only, folder)
    n_found = sum(n for (_, end), n in ends.items() if " at " in end)
    print(f"{sum(ends.values())} inputs, {n_found} not survived")
    for (kind, end), n in sorted(ends.items()):
        print(f"{n:9} {kind}: {end}")
    sys.exit(int(n_found > 0))


def _again(path: Path) -> str:
    if path.is_dir():
        return texts.survive_store(path, whole=True)
    if path.suffix == ".toml":
        read = next(reader for name, (_, reader) in texts.SETTINGS.items() if name in path.name)
        return texts.survive_settings(path, read)
    is_text = path.suffix == ".txt"
    return (texts.survive_text if is_text else survive)(path, whole=True)


def _run(seed: int, seconds: float, only: str | None, keep: Path) -> Counter[tuple[str, str]]:
    """Damage and read; return how often each kind of input ended how."""
    chance, ends = random.Random(seed), Counter[tuple[str, str]]()
    kinds = [kind for kind, n in _TURNS.items() for _ in range(n) if only in (None, kind)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as room:
        makers = _makers(Path(room))
        until, turn = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            kind, turn = chance.choice(kinds), turn + 1
            given, survived, undo = makers[kind](chance)
            try:
                ends[kind, survived(turn % _WHOLE[kind] == 0)] += 1
            except KeyboardInterrupt:
                break
            except BaseException as error:
                found = f"{type(error).__name__} at {_place(error)}"
                ends[kind, found] += 1
                if ends[kind, found] == 1:
                    print(f"{found}: {_kept(given, keep / f'{seed}-{turn}', survived, found)}")
                    sys.stdout.flush()
            undo()
    return ends


def _makers(room: Path) -> dict[str, Callable[[random.Random], Case]]:
    """By kind: what makes a case of it, all in one folder."""
    recordings, others = [make() for make in SEEDS.values()], list(texts.TEXTS.values())
    logs = [data for name, data in texts.TEXTS.items() if "log" in name or "journal" in name]
    trace, store = room / "trace.txt", room / "store"
    trace.write_bytes(texts.TEXTS["ftrace text"])
    convert([SAMPLES / "tracecmd-v7.dat"], store, ReadOptions())
    tdxtrace.read_trace(store).tables()

    def recording(chance: random.Random) -> Case:
        path = room / "case.dat"
        path.write_bytes(mutate(chance.choice(recordings), chance))
        return path, partial(survive, path), path.unlink

    def text(chance: random.Random) -> Case:
        path = room / "case.txt"
        path.write_bytes(texts.mutate_text(chance.choice(others), chance, others))
        return path, partial(texts.survive_text, path), path.unlink

    def dmesg(chance: random.Random) -> Case:
        path = room / "log.txt"
        path.write_bytes(texts.mutate_text(chance.choice(logs), chance, logs))
        return path, lambda whole: texts.survive_text(trace, whole, dmesg=[path]), path.unlink

    def stored(chance: random.Random) -> Case:
        undo = texts.mutate_store(store, chance)
        return store, partial(texts.survive_store, store), undo

    def settings(chance: random.Random) -> Case:
        name = chance.choice(list(texts.SETTINGS))
        data, read = texts.SETTINGS[name]
        path = room / ("tdxtrace.toml" if name == "settings" else f"{name}.toml")
        path.write_bytes(texts.mutate_settings(data, chance))
        return path, lambda _: texts.survive_settings(path, read), path.unlink

    return {
        "recording": recording,
        "text": text,
        "dmesg": dmesg,
        "store": stored,
        "settings": settings,
    }


def _kept(given: Path, name: Path, survived: Callable[[bool], str], found: str) -> Path:
    """Keep an input, made as short as it can be where it is a file."""
    kept = name.with_name(f"{name.name}-{given.name}")
    if given.is_dir():
        shutil.copytree(given, kept, dirs_exist_ok=True)
    else:
        kept.write_bytes(_shortened(given, survived, found))
    return kept


def _place(error: BaseException) -> str:
    """The file and line that raised an error: errors of one place are one finding."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return "nowhere" if at is None else f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"


def _shortened(given: Path, survived: Callable[[bool], str], found: str) -> bytes:
    """The shortest beginning of an input, in halves, that is not survived in the same way."""
    data = given.read_bytes()
    size, step = len(data), len(data) // 2
    while step:
        given.write_bytes(data[: size - step])
        try:
            survived(True)
        except Exception as error:
            if f"{type(error).__name__} at {_place(error)}" == found:
                size -= step
        step //= 2
    return data[:size]


if __name__ == "__main__":
    main()
