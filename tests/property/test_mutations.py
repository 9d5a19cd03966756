"""Damaged recordings give an answer, in part, or a clear error: never a crash or a hang."""

import random
import resource
from collections import Counter

import pytest
from support.mutations import SEEDS, in_memory, mutate, survive

from tdxtrace.ingest.tracedat import merge

PER_SEED = 2600
"""Of each of the eight recordings: 20,800 in all."""
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
