"""Damaged inputs give a partial result or a clear error, never a crash or a hang."""

import random
import resource
from collections import Counter
from pathlib import Path

import pytest
from support.mutated_text import (
    SETTINGS,
    TEXTS,
    mutate_settings,
    mutate_text,
    survive_settings,
    survive_text,
)
from support.mutations import SEEDS, in_memory, mutate, survive

from tdxtrace.ingest.tracedat import merge

PER_SEED = 1750
"""Of each of the eight recordings: 14,000; with texts and settings 30,000 in all."""
N_TEXTS = 3000
N_SETTINGS = 12_000
ONE_WHOLE_IN = 60
MAX_GROWTH_KIB = 512 << 10


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for small recordings only, which takes no time to make."""
    monkeypatch.setattr(merge, "_CPU_BYTES", 8 << 10)
    monkeypatch.setattr(merge, "BATCH_ROWS", 1 << 10)


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_recordings_are_survived(kind: str) -> None:
    data, chance = SEEDS[kind](), random.Random(kind)
    ends: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with in_memory() as written:
        assert survive(written(data), whole=True) == "read"
        for number in range(PER_SEED):
            path = written(mutate(data, chance))
            ends[survive(path, whole=number % ONE_WHOLE_IN == 0)] += 1
    assert ends["read"] > PER_SEED // 4
    assert ends["refused"] > PER_SEED // 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


@pytest.mark.parametrize("kind", SEEDS)
def test_recordings_cut_at_any_byte_are_survived(kind: str) -> None:
    data = SEEDS[kind]()
    with in_memory() as written:
        for n_bytes in range(1, len(data), 23):
            survive(written(data[:n_bytes]), whole=n_bytes % 60 == 0)


def test_damaged_texts_are_survived() -> None:
    chance, texts = random.Random("texts"), list(TEXTS.values())
    ends: Counter[str] = Counter()
    with in_memory() as written:
        for number in range(N_TEXTS):
            path = written(mutate_text(chance.choice(texts), chance, texts))
            ends[survive_text(path, whole=number % 1000 == 0)] += 1
    assert ends["read"] > N_TEXTS // 2
    assert ends["refused"] > N_TEXTS // 100


@pytest.mark.parametrize("name", SETTINGS)
def test_damaged_settings_are_survived(name: str, tmp_path: Path) -> None:
    chance, (data, read) = random.Random(name), SETTINGS[name]
    path = tmp_path / "tdxtrace.toml"
    ends: Counter[str] = Counter()
    for _ in range(N_SETTINGS // len(SETTINGS)):
        path.write_bytes(mutate_settings(data, chance))
        ends[survive_settings(path, read)] += 1
    assert ends["read"] > 0
    assert ends["refused"] > N_SETTINGS // 10
