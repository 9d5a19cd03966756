"""Options that control how a command prints its table, and the printing itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdxtrace.cli import options
from tdxtrace.cli.options import OutputFormat
from tdxtrace.cli.query_options import QueryOptions

if TYPE_CHECKING:
    import polars as pl
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True, kw_only=True)
class PrintOptions:
    """Options for the format and destination of a table."""

    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            "-n",
            metavar="N",
            min=0,
            show_default=False,
            help="Most rows, not 40; 0: all.",
        ),
    ] = 40
    form: options.Format = OutputFormat.table
    output: options.Output = None
    force: options.Force = False

    def show(self, rows: pl.DataFrame, query: QueryOptions, *others: Path | None) -> None:
        """Print ``rows``, the answer to ``query``; ``others`` are further files that it read.

        Raises:
            InputError: If the file exists and is not to be overwritten, was read, or cannot be
                written.
            QueryError: If Parquet would go to a terminal.
        """
        from tdxtrace.cli import outputs

        if self.form is not OutputFormat.table:
            inputs = [*query.inputs, *others]
            outputs.write_table(rows, self.form, self.output, force=self.force, inputs=inputs)
            return
        from tdxtrace.report.listing import listing

        width = outputs.console().width
        self.draw(listing(rows, self.limit, width), query, *others)

    def draw(self, shown: RenderableType, query: QueryOptions, *others: Path | None) -> None:
        """Print a rich renderable, or write it as plain text; see :meth:`show`.

        Raises:
            InputError: If the file exists and is not to be overwritten, was read, or cannot be
                written.
        """
        from tdxtrace.cli import outputs

        if self.output is None:
            outputs.print_screen(shown, query.no_color)
            return
        plain = outputs.console(no_color=True)
        with plain.capture() as text:
            plain.print(shown)
        inputs = [*query.inputs, *others]
        outputs.write_file(self.output, text.get().encode(), force=self.force, inputs=inputs)
