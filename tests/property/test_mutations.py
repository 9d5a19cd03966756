"""Damaged recordings give an answer, in part, or a clear error: never a crash or a hang."""

import random
import resource
from collections import Counter
from pathlib import Path

import pytest
from support.mutations import SEEDS, mutate, survive

PER_SEED = 2600
"""Of each of the eight recordings: 20,800 in all."""
ONE_WHOLE_IN = 20
MAX_GROWTH_KIB = 512 << 10


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_recordings_are_survived(kind: str, tmp_path: Path) -> None:
    data, chance = SEEDS[kind](), random.Random(kind)
    path = tmp_path / "recording"
    path.write_bytes(data)
    assert survive(path, whole=True) == "read"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: Counter[str] = Counter()
    for number in range(PER_SEED):
        path.write_bytes(mutate(data, chance))
        ends[survive(path, whole=number % ONE_WHOLE_IN == 0)] += 1
    assert ends["read"] > PER_SEED // 4
    assert ends["refused"] > PER_SEED // 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


@pytest.mark.parametrize("kind", SEEDS)
def test_recordings_cut_at_any_byte_are_survived(kind: str, tmp_path: Path) -> None:
    data, path = SEEDS[kind](), tmp_path / "recording"
    for n_bytes in range(1, len(data), 7):
        path.write_bytes(data[:n_bytes])
        survive(path, whole=n_bytes % 20 == 0)
