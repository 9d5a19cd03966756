"""``tdxtrace query TRACE "select …"``: SQL over every table."""

from __future__ import annotations

from typing import Annotated

import typer

from tdxtrace.cli.groups import spread
from tdxtrace.cli.inputs import Request
from tdxtrace.cli.printing import Printing


@spread
def query_command(
    request: Request,
    statement: Annotated[
        str,
        typer.Argument(metavar="SQL", help="One SELECT, polars' dialect.", show_default=False),
    ],
    printing: Printing,
) -> None:
    """Ask every table in SQL; "show tables" names them, leaves (leaf, name) can be joined.

    Example: tdxtrace query trace.txt "select outcome, count(*) from retry_chains group by 1"
    """
    from tdxtrace.pipeline import query

    printing.show(query(request.read(), statement, request.selection), request)
