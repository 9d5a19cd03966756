"""Which kernel, or program, and what of it: the user's words become a recipe's ingredients."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tdxtrace.capture import buffers, dynamic, machine, symbols, tracing
from tdxtrace.capture.btf import open_btf
from tdxtrace.capture.host import Host
from tdxtrace.capture.options import Detail, RecordOptions
from tdxtrace.capture.programs import program as program_at
from tdxtrace.capture.recipe import GROUP, Kernel, Recipe, Wish, recipe
from tdxtrace.capture.recorder import Form, Order
from tdxtrace.capture.recording import work_folders
from tdxtrace.errors import InputError, QueryError
from tdxtrace.tables.files import refuse_overwriting
from tdxtrace.tables.text import one_line

# The wrappers' arguments that a program's functions have, if the user does not say: those of
# the first kernel with TDs.
_FIRST: Final = "6.16"


def wanted_kernel(
    host: Host,
    release: str | None,
    kallsyms: Path | None,
    btf: Sequence[Path],
    program: Path | None,
) -> Kernel:
    """Return the kernel that is meant: the running one, unless a word says otherwise.

    Args:
        host: The machine.
        release: Of another kernel, such as "6.16".
        kallsyms: A copy of its symbols.
        btf: Its types, and those of its kvm_intel.
        program: A program to trace in its place.

    Raises:
        QueryError: If the release is no release, or words contradict each other.
        InputError: If a file cannot be read.
        FormatError: If a file is not what it should be.
    """
    if release is not None and not re.match(r"\d{1,3}\.\d{1,4}(?!\d)", release):
        raise QueryError(f"not a kernel release: {one_line(release, 40)!r}; write e.g. 6.16")
    if program is not None:
        if kallsyms is not None or btf:
            raise QueryError("--program has symbols of its own; leave --from-kallsyms, --btf out")
        return program_at(program, release or _FIRST)
    if release is None and kallsyms is None and not btf:
        return tracing.kernel_of(host)
    if release is None and kallsyms is not None:
        raise QueryError("kallsyms does not tell the release: add --kernel, e.g. --kernel 6.18")
    known = symbols.Symbols() if kallsyms is None else symbols.from_file(kallsyms)
    if release is None:
        known = symbols.of_host(host)
    return Kernel(release or host.release, known, open_btf(btf) if btf else None)


def wish_of(
    detail: str, seamcalls: bool, only_tds: bool, rate: int | None, group: str = GROUP
) -> Wish:
    """Put the user's words together."""
    return Wish(Detail(detail), seamcalls, only_tds, rate or buffers.RATE, group)


def own_tracefs(host: Host) -> Path:
    """Return tracefs, which this process may write.

    Raises:
        InputError: If it is not mounted, or not ours to write; says what to do.
    """
    for check in (machine.privilege(host), tracing.tracefs(host)):
        if check.state == "missing":
            raise InputError(f"{check.found}; {check.remedy}")
    where = host.tracefs
    if where is None:
        raise InputError("tracefs is not mounted; see: tdxtrace capture doctor")
    return where


def recipe_of(host: Host, wanted: RecordOptions) -> Recipe:
    """Choose what to trace on this host, under a name that no other process has.

    Raises:
        InputError: If nothing can be traced, or the program cannot be read.
        FormatError: If the program is none.
    """
    kernel = wanted_kernel(host, None, None, (), wanted.program)
    wish = wish_of(
        wanted.detail, wanted.seamcalls, wanted.only_tds, wanted.rate, dynamic.own_name()
    )
    made = recipe(kernel, wish)
    if not made.probes and wish.detail is not Detail.stock:
        raise InputError(
            "this kernel has no SEAMCALL wrapper to probe; record KVM's own events with --level "
            "stock, or see: tdxtrace capture doctor"
        )
    if made.probes and wanted.program is None:
        check = tracing.kprobes(host)
        if check.state != "ok":
            raise InputError(f"no kprobes: {check.found}; use --level stock, or {check.remedy}")
    return made


def order_of(
    host: Host, wanted: RecordOptions, say: Callable[[str], None], *, is_written: bool = True
) -> Order:
    """Put the order for a recording together, and refuse what would not work.

    Raises:
        QueryError: If a time or size is none.
        InputError: If the output exists, or the host lacks something.
        FormatError: If the program is none.
    """
    seconds = None if wanted.duration is None else seconds_of(wanted.duration)
    asked = None if wanted.buffer is None else _kib(wanted.buffer)
    own_tracefs(host)
    leftovers = _replaceable(wanted) if is_written else []
    made = recipe_of(host, wanted)
    n_cpus = tracing.n_cpus(host)
    size = buffers.affordable_kb(made.buffer_kb, n_cpus, tracing.available_kb(host))
    return Order(
        made,
        wanted.output,
        _form(wanted.output),
        asked or size,
        seconds,
        tuple(wanted.command),
        tuple(wanted.pids),
        say,
        leftovers,
    )


def _replaceable(wanted: RecordOptions) -> list[Path]:
    """See that nothing is overwritten unasked, before anything is traced.

    Returns:
        What earlier recorders left beside the output; it goes when the recording is whole.

    Raises:
        InputError: If something is in the way.
    """
    output = wanted.output
    shown = one_line(str(output))
    left, _ = work_folders(output)
    for path in (output, *left):
        if path.exists() and not wanted.force:
            raise InputError(f"{one_line(str(path))} exists; say --force to overwrite it")
        refuse_overwriting(path, [wanted.program])
    if output.exists() and not (output.is_file() or output.is_dir()):
        raise InputError(f"{shown} is no file, and no folder")
    if output.is_dir() and not (output / "capture.json").exists() and any(output.iterdir()):
        raise InputError(f"{shown} is a folder that tdxtrace did not make")
    if not output.absolute().parent.is_dir():
        raise InputError(f"cannot write {shown}: there is no folder {shown!r} would be in")
    return left


def _form(output: Path) -> Form:
    return {".dat": Form.dat, ".txt": Form.text}.get(output.suffix, Form.pages)


def seconds_of(text: str) -> float:
    """Read a length of time such as 10s, 500ms, 5min.

    Raises:
        QueryError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|min|h|)", text.strip())
    if found is None or not float(found[1]):
        raise QueryError(f"not a time: {one_line(text, 40)!r}; write e.g. 10s or 5min")
    return float(found[1]) * {"ms": 1e-3, "m": 60, "min": 60, "h": 3600}.get(found[2], 1)


def _kib(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([KMG])", text.strip().upper().removesuffix("IB"))
    size = int(found[1]) << {"K": 0, "M": 10, "G": 20}[found[2]] if found else 0
    if not size:
        raise QueryError(f"not a size: {one_line(text, 40)!r}; write e.g. 64M")
    return size
