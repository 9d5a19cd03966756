"""Manual pages, generated from the help: ``python -m tdxtrace.cli.man DIR``.

Writes one page for the program and one for each command, in the format of man(7):
``DIR/tdxtrace.1``, ``DIR/tdxtrace-analyze.1``, ``DIR/tdxtrace-capture-record.1`` and so on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

import typer
import typer.main

from tdxtrace import __version__
from tdxtrace.cli.help import exit_statuses, parameter_records
from tdxtrace.cli.main import app
from tdxtrace.errors import InputError

_OPTION: Final = re.compile(r"(?<![\w-])(--?\w[\w-]*)")
_EXAMPLE: Final = "Example: "


def pages() -> dict[str, str]:
    """Return the text of every manual page by its file name."""
    program = typer.main.get_command(app)
    ctx = typer.Context(program, info_name="tdxtrace")
    return {f"{'-'.join(words)}.1": text for words, text in _pages(program, ctx, ("tdxtrace",))}


def _pages(command: Any, ctx: Any, words: tuple[str, ...]) -> Iterator[tuple[Sequence[str], str]]:  # noqa: ANN401
    names = command.list_commands(ctx) if hasattr(command, "list_commands") else []
    yield words, _page(command, ctx, words, names)
    for name in names:
        own = command.get_command(ctx, name)
        inner = type(ctx)(own, info_name=name, parent=ctx)
        yield from _pages(own, inner, (*words, name))


def _page(command: Any, ctx: Any, words: Sequence[str], names: Sequence[str]) -> str:  # noqa: ANN401
    summary, *others = _paragraphs(command.help)
    examples = [text for text in others if text.startswith(_EXAMPLE)]
    title = "-".join(words)
    lines = [
        f'.TH {_text(title.upper())} 1 "{date.today()}" "tdxtrace {__version__}" "tdxtrace"',
        ".SH NAME",
        f"{_text(title)} \\- {_text(summary[0].lower() + summary[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_text(' '.join(words))}",
        _text(" ".join(command.collect_usage_pieces(ctx))),
        ".SH DESCRIPTION",
        _text(summary),
    ]
    for text in others:
        if text not in examples:
            lines += [".PP", _text(text)]
    lines += _entries("COMMANDS", ((n, _sentence(command, ctx, n)) for n in names))
    for section, records in parameter_records(command, ctx).items():
        lines += _entries(section.upper(), records)
    lines += [".SH EXIT STATUS", _text(exit_statuses(command.get_params(ctx), of_all=bool(names)))]
    if examples:
        lines += [".SH EXAMPLES"]
        for text in examples:
            lines += [".EX", _text(text.removeprefix(_EXAMPLE)), ".EE"]
    lines += [".SH SEE ALSO", _also(words, names)]
    return "\n".join(lines) + "\n"


def _sentence(command: Any, ctx: Any, name: str) -> str:  # noqa: ANN401
    return _paragraphs(command.get_command(ctx, name).help)[0]


def _entries(
    title: str, records: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]
) -> list[str]:
    lines = [line for name, text in records for line in (".TP", _bold(name), _text(text))]
    return [f".SH {title}", *lines] if lines else []


def _also(words: Sequence[str], names: Sequence[str]) -> str:
    pages = ["-".join((*words, name)) for name in names] or ["tdxtrace"]
    return ",\n".join(f"\\fB{_text(page)}\\fR(1)" for page in pages)


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _bold(text: str) -> str:
    return _text(_OPTION.sub("\0\\1\1", text)).replace("\0", "\\fB").replace("\1", "\\fR")


def _text(text: str) -> str:
    """Escape text for man(7): backslashes, minus signs, and a control character at the start."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    escaped = escaped.replace("…", "\\[u2026]")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def write(folder: Path) -> int:
    """Write every page into ``folder``, which is created; return their number.

    Raises:
        InputError: If a page cannot be written.
    """
    made = pages()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            (folder / name).write_text(text, "ascii")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from None
    return len(made)


def main(words: Sequence[str]) -> int:
    """Write the pages into the folder that the command line names; return the exit status."""
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: python -m tdxtrace.cli.man DIR", file=sys.stderr)
        return 2
    try:
        n = write(Path(words[0]))
    except InputError as error:
        print(f"tdxtrace: {error}", file=sys.stderr)
        return 1
    print(f"wrote {n} pages; read one: man -l {Path(words[0]) / 'tdxtrace.1'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
