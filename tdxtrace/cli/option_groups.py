"""Options that go together: a command takes a group as one parameter, typer sees each option."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, get_type_hints


def expand_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options of each of its parameters that is a dataclass.

    The fields of such a class are declared as typer wants its parameters,
    ``Annotated`` with an option. The command line has one option for each, and the
    command is called with the class made of them.

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

    def run(**given: Any) -> None:  # noqa: ANN401 - of every type that an option has
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
    """Print the library's calls that do what a command does; its name is its function's."""
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
