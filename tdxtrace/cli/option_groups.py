"""Groups of options: one parameter of the command function, many options for typer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, get_type_hints


def expand_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with each dataclass parameter expanded into one option per field.

    The fields are annotated as typer expects parameters to be. The returned function takes
    all options, builds the dataclasses and calls ``command``; with --python it prints
    equivalent Python code instead.

    Raises:
        TypeError: If two parameters, or two fields, have the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        n: hint for n, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _options_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=_KIND, annotation=hints[name]))

    def run(**given: Any) -> None:  # noqa: ANN401 - options have various types
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            given[name] = group(**{field: given.pop(field) for field in fields})
        if any(getattr(given[name], "python", False) for name in groups):
            _show_calls(command.__name__, given)
        else:
            command(**given)

    names = {parameter.name for parameter in parameters}
    if len(names) < len(parameters):
        raise TypeError(f"{command.__name__} has an option twice")
    update_wrapper(run, command)
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _show_calls(function: str, given: dict[str, Any]) -> None:
    """Print Python code equivalent to the command whose function is ``function``."""
    from tdxtrace.cli.as_python import library_calls

    name = function.removesuffix("_command").replace("_", "-")
    print(library_calls(name, given["query"], given))


_KIND = inspect.Parameter.KEYWORD_ONLY


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(field.name, _KIND, default=_default(field), annotation=hints[field.name])
        for field in dataclasses.fields(group)
    ]


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
