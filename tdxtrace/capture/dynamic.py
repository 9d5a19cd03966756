"""Dynamic events and instances that belong to tdxtrace: add, identify, remove.

dynamic_events is global.  Lines are appended and removed one by one; the file is never opened
for truncation, which would remove all events (Linux kernel/trace/trace_dynevent.c,
dyn_event_open).  Events of tdxtrace are identified by their group: ``tdxtrace_PID_STARTED``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tdxtrace.tables.temporary import start_time

PREFIX: Final = "tdxtrace_"
_OWN_EVENT: Final = re.compile(
    rf"^[prf]\d*:(?P<group>{PREFIX}(?P<pid>\d+)_(?P<started>\d+))/(?P<event>\w+)"
)
_NAME: Final = re.compile(rf"^{PREFIX}(?P<pid>\d+)_(?P<started>\d+)$")
_LISTS: Final = ("dynamic_events", "kprobe_events", "uprobe_events")


def own_name() -> str:
    """Return the unique name of this process's instance and event group."""
    return f"{PREFIX}{os.getpid()}_{start_time(os.getpid())}"


def lines(tracefs: Path) -> list[str]:
    """Return all dynamic events of the host; empty if they cannot be read."""
    found: list[str] = []
    for name in _LISTS:
        try:
            found += (tracefs / name).read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        if name == "dynamic_events":
            break
    return found


def instances(tracefs: Path) -> list[str]:
    """Return the names of all instances."""
    try:
        return sorted(os.listdir(tracefs / "instances"))  # noqa: PTH208 - names, not paths
    except OSError:
        return []


def is_ours(line: str) -> bool:
    """Return whether a dynamic event was added by tdxtrace."""
    return bool(_OWN_EVENT.match(line))


def events_of(tracefs: Path, name: str) -> list[str]:
    """Return the events of the group ``name``."""
    found = (_OWN_EVENT.match(line) for line in lines(tracefs))
    return [match["event"] for match in found if match and match["group"] == name]


def leftovers(tracefs: Path) -> list[str]:
    """Return names of tdxtrace's instances and groups whose process has ended, sorted."""
    groups = {match["group"] for line in lines(tracefs) if (match := _OWN_EVENT.match(line))}
    names = groups | {name for name in instances(tracefs) if name.startswith(PREFIX)}
    return sorted(name for name in names if _is_gone(name))


def _is_gone(name: str) -> bool:
    found = _NAME.match(name)
    return found is not None and start_time(int(found["pid"])) != int(found["started"])


def add(tracefs: Path, made: Iterable[str]) -> None:
    """Append event definitions, one write each.

    Raises:
        OSError: If the kernel refuses one; ``filename`` is that definition.
    """
    for line in made:
        _append(tracefs, line, line)


def _append(tracefs: Path, text: str, line: str) -> None:
    """Write to dynamic_events; before Linux 5.0 to kprobe_events or uprobe_events."""
    target = tracefs / "dynamic_events"
    if not target.exists():
        target = tracefs / ("uprobe_events" if ":0x" in line else "kprobe_events")
    # O_APPEND without O_TRUNC: with O_TRUNC the kernel removes all events of the list.
    fd = os.open(target, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, text.encode() + b"\n")
    except OSError as error:
        error.filename = line
        raise
    finally:
        os.close(fd)


def remove(tracefs: Path, name: str) -> list[str]:
    """Remove the events of the group ``name``, which must begin with ``PREFIX``.

    Returns:
        Events that could not be removed, with the reason.
    """
    if not name.startswith(PREFIX):
        raise ValueError(name)
    kept = []
    for event in events_of(tracefs, name):
        line = next((x for x in lines(tracefs) if f":{name}/{event} " in f"{x} "), "")
        try:
            _append(tracefs, f"-:{name}/{event}", line)
        except OSError as error:
            kept.append(f"{name}/{event}: {error.strerror}")
    return kept
