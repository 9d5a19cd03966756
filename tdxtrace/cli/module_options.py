"""Options that say which TDX module made a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from tdxtrace.cli.inputs import Request

if TYPE_CHECKING:
    from tdxtrace.tables.trace import Findings, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleOptions:
    """The module, by its release or by its locks; the trace may tell, or leave it open."""

    module: Annotated[
        str | None,
        typer.Option(
            "--module",
            metavar="VERSION",
            help="Release of the TDX module, e.g. 1.5.16.",
        ),
    ] = None
    generation: Annotated[
        str | None,
        typer.Option(
            "--generation",
            metavar="LETTER",
            help="Or its locks: A 1.0, B 1.5.01, C from 1.5.20.",
        ),
    ] = None

    def read(self, request: Request) -> Trace:
        """Read the traces; wrong words are refused before a large one is.

        Raises:
            TdxtraceError: If they cannot be read or understood, or the module is not known.
        """
        from tdxtrace.analysis.causes.generation import chosen_generations

        chosen_generations(self.module, self.generation)
        return request.read()

    def analyze(self, trace: Trace, request: Request) -> Findings:
        """Answer what is asked of a trace, for this module.

        Raises:
            TdxtraceError: If the trace lacks what is asked for.
        """
        from tdxtrace.pipeline import analyze

        return analyze(trace, request.selection, module=self.module, generation=self.generation)
