"""Convert command-line options to a kernel or program, a recipe and a recording plan."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tdxtrace.capture import dynamic, machine, symbols, tracing
from tdxtrace.capture.btf import open_btf
from tdxtrace.capture.host import Host
from tdxtrace.capture.options import Detail, RecordOptions
from tdxtrace.capture.probes import RATE, affordable_kb
from tdxtrace.capture.recipe import GROUP, Kernel, Recipe, RecipeOptions, recipe
from tdxtrace.capture.recorder import OutputForm, RecordingPlan
from tdxtrace.capture.recording import work_folders
from tdxtrace.capture.symbols import Symbols
from tdxtrace.errors import FormatError, InputError, QueryError
from tdxtrace.tables.files import refuse_overwriting
from tdxtrace.tables.text import one_line
from tdxtrace.tables.times import parse_duration
from tdxtrace.tdx import wrappers

# The kernel parses the path of a uprobe up to the first blank, and its offset after the last
# colon: Linux kernel/trace/trace_uprobe.c, __trace_uprobe_create.
_FORBIDDEN: Final = " \t\n\r\"'\\"
# Default kernel release for the wrapper signatures of a program: the first with TDX.
_FIRST: Final = "6.16"


def kernel_to_trace(
    host: Host,
    release: str | None,
    kallsyms: Path | None,
    btf: Sequence[Path],
    program: Path | None,
) -> Kernel:
    """Return the kernel to trace: the running one unless an option names another.

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
            raise QueryError("--program has its own symbols; omit --from-kallsyms and --btf")
        return program_kernel(program, release or _FIRST)
    if release is None and kallsyms is None and not btf:
        return tracing.kernel_of(host)
    if release is None and kallsyms is not None:
        raise QueryError("kallsyms does not name the release: add --kernel, e.g. --kernel 6.18")
    known = symbols.Symbols() if kallsyms is None else symbols.from_file(kallsyms)
    if release is None:
        known = symbols.of_host(host)
    return Kernel(release or host.release, known, open_btf(btf) if btf else None)


def recipe_options(
    detail: str, seamcalls: bool, only_tds: bool, rate: int | None, group: str = GROUP
) -> RecipeOptions:
    """Return recipe options, with the default rate if none is given."""
    return RecipeOptions(Detail(detail), seamcalls, only_tds, rate or RATE, group)


def writable_tracefs(host: Host) -> Path:
    """Return the tracefs mount point, which this process may write to.

    Raises:
        InputError: If it is not mounted or not writable; the message has the remedy.
    """
    for check in (machine.privilege(host), tracing.tracefs(host)):
        if check.state == "missing":
            raise InputError(f"{check.found}; {check.remedy}")
    tracefs = host.tracefs
    if tracefs is None:
        raise InputError("tracefs is not mounted; see: tdxtrace capture doctor")
    return tracefs


def recipe_of(host: Host, options: RecordOptions) -> Recipe:
    """Return the recipe for this host, with an event group unique to this process.

    Raises:
        InputError: If nothing can be traced, or the program cannot be read.
        FormatError: If the program is not an ELF file.
    """
    kernel = kernel_to_trace(host, None, None, (), options.program)
    selected = recipe_options(
        options.detail, options.seamcalls, options.only_tds, options.rate, dynamic.own_name()
    )
    result = recipe(kernel, selected)
    if not result.probes and selected.detail is not Detail.stock:
        raise InputError(
            "this kernel has no SEAMCALL wrapper to probe; record KVM's own events with --level "
            "stock, or see: tdxtrace capture doctor"
        )
    if result.probes and options.program is None:
        check = tracing.kprobes(host)
        if check.state != "ok":
            raise InputError(f"no kprobes: {check.found}; use --level stock, or {check.remedy}")
    return result


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
    size = affordable_kb(made.buffer_kb, n_cpus, tracing.available_kb(host))
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
        Directories of incomplete recordings beside the output, to be removed when this recording
        is complete.

    Raises:
        InputError: If the output exists and must not be overwritten.
    """
    output = options.output
    shown = one_line(str(output))
    left, _ = work_folders(output)
    for path in (output, *left):
        if path.exists() and not options.force:
            raise InputError(f"{one_line(str(path))} exists; use --force to overwrite")
        refuse_overwriting(path, [options.program])
    if output.exists() and not (output.is_file() or output.is_dir()):
        raise InputError(f"{shown} is neither a file nor a folder")
    if output.is_dir() and not (output / "capture.json").exists() and any(output.iterdir()):
        raise InputError(f"{shown} is a folder that tdxtrace did not create; name another output")
    if not output.absolute().parent.is_dir():
        raise InputError(f"cannot write {shown}: its folder does not exist")
    return left


def _form(output: Path) -> OutputForm:
    return {".dat": OutputForm.dat, ".txt": OutputForm.text}.get(output.suffix, OutputForm.pages)


def seconds_of(text: str) -> float:
    """Parse a duration such as 10s, 1.5ms or 5min; return seconds.

    Raises:
        QueryError: If it is not a duration.
    """
    return parse_duration(text) / 1e9


def _kib(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([KMG])", text.strip().upper().removesuffix("IB"))
    size = int(found[1]) << {"K": 0, "M": 10, "G": 20}[found[2]] if found else 0
    if not size:
        raise QueryError(f"not a size: {one_line(text, 40)!r}; write e.g. 64M")
    return size


def program_kernel(path: Path, release: str) -> Kernel:
    """Return a program whose functions are named like wrappers, as a kernel to trace.

    Such a program, for example tests/capture/testbed.c, replaces a TDX host in tests: uprobes on
    its functions use the same tracing code of the kernel as kprobes.

    Args:
        path: An ELF file with symbols.
        release: Kernel release that defines the signatures of its functions, such as "6.16".

    Raises:
        InputError: If it cannot be read, or the kernel does not accept its path.
        FormatError: If it is not an ELF file, or has no function named like a wrapper.
    """
    path_text = str(path.absolute())
    shown = one_line(path_text)
    if any(c in path_text for c in _FORBIDDEN):
        raise InputError(f"{shown}: the kernel takes no blank or quote in a probed path")
    locations = {name: f"{path_text}:{at:#x}" for name, at in _functions(path, shown).items()}
    if not locations:
        raise FormatError(f"{shown} has no function named like a wrapper (tdh_mem_page_aug, ...)")
    return Kernel(
        release, Symbols(frozenset(locations), frozenset(), shown), None, False, locations
    )


def _functions(path: Path, shown: str) -> dict[str, int]:
    """Return the file offset of each function named like a wrapper."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415 - only where it is needed
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415
    from elftools.elf.sections import SymbolTableSection  # noqa: PLC0415

    known = wrappers.sources()
    try:
        with path.open("rb") as file:
            elf = ELFFile(file)
            tables = [s for s in elf.iter_sections() if isinstance(s, SymbolTableSection)]
            loaded = [s.header for s in elf.iter_segments() if s.header["p_type"] == "PT_LOAD"]
            found = {}
            for symbol in (one for table in tables for one in table.iter_symbols()):
                at = int(symbol["st_value"])
                if symbol.name in known and symbol["st_info"]["type"] == "STT_FUNC" and at:
                    found[symbol.name] = next(
                        at - s["p_vaddr"] + s["p_offset"]
                        for s in loaded
                        if s["p_vaddr"] <= at < s["p_vaddr"] + s["p_filesz"]
                    )
            return found
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from None
    except (ELFError, ValueError, struct.error, StopIteration):
        raise FormatError(f"{shown} is not an ELF program, or is damaged") from None
