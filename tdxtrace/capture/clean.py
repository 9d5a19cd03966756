"""What a recorder that was killed left behind is removed; never anything of another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tdxtrace.capture import dynamic
from tdxtrace.capture.instance import Instance


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of the leftovers."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    """Names and why they are still there."""


def clean(tracefs: Path) -> Cleaned:
    """Remove instances and probes of recorders that are no more.

    A name of ours holds the process and when it was started; it is a leftover if there is no
    such process.  One that runs where we do not see it (another PID namespace) holds its
    instance open, so that the kernel refuses to remove it, and its probes are left too.
    """
    removed, kept = [], []
    for name in dynamic.leftovers(tracefs):
        left = Instance(tracefs, name).remove()
        why = [left] if left else dynamic.remove(tracefs, name)
        if why:
            kept.append(f"{name}: {'; '.join(why)}")
        else:
            removed.append(name)
    return Cleaned(tuple(removed), tuple(kept))
