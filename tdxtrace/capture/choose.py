"""From command-line options to a kernel, a recipe and a recording plan."""

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
from tdxtrace.capture.recipe import GROUP, Kernel, Recipe, RecipeOptions, recipe
from tdxtrace.capture.recorder import OutputForm, RecordingPlan
from tdxtrace.capture.recording import work_folders
from tdxtrace.errors import InputError, QueryError
from tdxtrace.tables.files import refuse_overwriting
from tdxtrace.tables.text import one_line

# Default kernel release for the wrapper signatures of a program: the first with TDX.
_FIRST: Final = "6.16"


def kernel_to_trace(
    host: Host,
    release: str | None,
    kallsyms: Path | None,
    btf: Sequence[Path],
    program: Path | None,
) -> Kernel:
    """Return the kernel to trace: the running one, unless an option names another.

    Args:
        host: This host.
        release: Release of another kernel, such as "6.16".
        kallsyms: Copy of its /proc/kallsyms.
        btf: BTF files of it and of its kvm_intel.
        program: Program to trace instead.

    Raises:
        QueryError: If the release cannot be parsed, or options contradict each other.
        InputError: If a file cannot be read.
        FormatError: If a file has the wrong format.
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


def recipe_options(
    detail: str, seamcalls: bool, only_tds: bool, rate: int | None, group: str = GROUP
) -> RecipeOptions:
    """Return recipe options, with the default rate if none is given."""
    return RecipeOptions(Detail(detail), seamcalls, only_tds, rate or buffers.RATE, group)


def writable_tracefs(host: Host) -> Path:
    """Return the tracefs mount point, which this process may write to.

    Raises:
        InputError: If it is not mounted or not writable; the message has the remedy.
    """
    for check in (machine.privilege(host), tracing.tracefs(host)):
        if check.state == "missing":
            raise InputError(f"{check.found}; {check.remedy}")
    where = host.tracefs
    if where is None:
        raise InputError("tracefs is not mounted; see: tdxtrace capture doctor")
    return where


def recipe_of(host: Host, options: RecordOptions) -> Recipe:
    """Return the recipe for this host, with an event group unique to this process.

    Raises:
        InputError: If nothing can be traced, or the program cannot be read.
        FormatError: If the program is not an ELF file.
    """
    kernel = kernel_to_trace(host, None, None, (), options.program)
    chosen = recipe_options(
        options.detail, options.seamcalls, options.only_tds, options.rate, dynamic.own_name()
    )
    made = recipe(kernel, chosen)
    if not made.probes and chosen.detail is not Detail.stock:
        raise InputError(
            "this kernel has no SEAMCALL wrapper to probe; record KVM's own events with --level "
            "stock, or see: tdxtrace capture doctor"
        )
    if made.probes and options.program is None:
        check = tracing.kprobes(host)
        if check.state != "ok":
            raise InputError(f"no kprobes: {check.found}; use --level stock, or {check.remedy}")
    return made


def plan_recording(
    host: Host, options: RecordOptions, say: Callable[[str], None], *, is_written: bool = True
) -> RecordingPlan:
    """Check the options of a recording and return its plan.

    Raises:
        QueryError: If a time or size cannot be parsed.
        InputError: If the output exists, or the host lacks something.
        FormatError: If the program is not an ELF file.
    """
    seconds = None if options.duration is None else seconds_of(options.duration)
    asked = None if options.buffer is None else _kib(options.buffer)
    writable_tracefs(host)
    leftovers = _replaceable(options) if is_written else []
    made = recipe_of(host, options)
    n_cpus = tracing.n_cpus(host)
    size = buffers.affordable_kb(made.buffer_kb, n_cpus, tracing.available_kb(host))
    return RecordingPlan(
        made,
        options.output,
        _form(options.output),
        asked or size,
        seconds,
        tuple(options.command),
        tuple(options.pids),
        say,
        leftovers,
    )


def _replaceable(options: RecordOptions) -> list[Path]:
    """Check the output path before anything is traced.

    Returns:
        Directories that earlier recorders left beside the output; to be removed once the
        recording is complete.

    Raises:
        InputError: If something exists and must not be overwritten.
    """
    output = options.output
    shown = one_line(str(output))
    left, _ = work_folders(output)
    for path in (output, *left):
        if path.exists() and not options.force:
            raise InputError(f"{one_line(str(path))} exists; say --force to overwrite it")
        refuse_overwriting(path, [options.program])
    if output.exists() and not (output.is_file() or output.is_dir()):
        raise InputError(f"{shown} is no file, and no folder")
    if output.is_dir() and not (output / "capture.json").exists() and any(output.iterdir()):
        raise InputError(f"{shown} is a folder that tdxtrace did not make")
    if not output.absolute().parent.is_dir():
        raise InputError(f"cannot write {shown}: there is no folder {shown!r} would be in")
    return left


def _form(output: Path) -> OutputForm:
    return {".dat": OutputForm.dat, ".txt": OutputForm.text}.get(output.suffix, OutputForm.pages)


def seconds_of(text: str) -> float:
    """Parse a duration such as 10s, 500ms or 5min; return seconds.

    Raises:
        QueryError: If it is not a duration.
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
