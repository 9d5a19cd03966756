"""Section on the origin of the report: command, version, date, inputs, kernel, module."""

from __future__ import annotations

from tdxtrace import __version__
from tdxtrace.report.origin import Origin
from tdxtrace.report.section import Section, grid
from tdxtrace.report.units import count, plural
from tdxtrace.tables.trace import Findings, Source


def section(findings: Findings, made: Origin) -> Section:
    """Return the section with all data needed to reproduce the report."""
    sources = findings.provenance.sources
    rows = [("tdxtrace", __version__)]
    rows += [("command", made.command)] if made.command else []
    rows += [("date", made.date)] if made.date else []
    for source in sources:
        rows += _source(source, made)
    rows += [("TDX module", module(findings)), *_options(findings)]
    return Section(
        "provenance",
        "Provenance",
        "Inputs and origin of this report.",
        [f"Made by tdxtrace {__version__} from {plural(len(sources), 'input')}."],
        grids=[grid(("what", "value"), rows)],
        is_always_shown=True,
    )


def _source(source: Source, made: Origin) -> list[tuple[str, str]]:
    digest = made.hashes.get(source.path)
    return [
        ("input", source.path),
        ("size", f"{count(source.n_bytes)} bytes"),
        *([("SHA-256", digest)] if digest else []),
        ("kernel", kernel(source)),
        *([("recorded with", source.tool)] if source.tool else []),
    ]


def kernel(source: Source) -> str:
    """Return the kernel of the recorded host."""
    return source.kernel or "not named in the input"


def module(findings: Findings) -> str:
    """Return the release of the TDX module, and the source of that information."""
    for name in ("module", "generation"):
        if name in findings.options:
            label = "" if name == "module" else "generation "
            return f"{label}{findings.options[name]} (as given)"
    named = sorted(map(str, findings.kernel_messages["module_version"].drop_nulls().unique()))
    if named:
        return f"{' or '.join(named)} (kernel log)"
    return "not named in the input (--module VERSION or --dmesg FILE name it)"


def _options(findings: Findings) -> list[tuple[str, str]]:
    return [
        (name, " or ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
        for name, value in findings.options.items()
        if name not in {"module", "generation"}
    ]
