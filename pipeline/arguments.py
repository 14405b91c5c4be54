"""What every command refuses before it runs: empty arguments, and numbers that are none."""

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command whose options and arguments all have a value.

    An empty one is a shell variable that is not set; as a path it would mean the current folder. NaN passes every
    comparison with a least and a greatest value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises:
            BadParameter: one is empty, or a number is NaN or infinite.
        """
        given = self.make_parser(ctx).parse_args(list(args))[0]
        rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            name = parameter.name or ""
            if "" in _values(given.get(name)):
                raise typer.BadParameter("it is empty; is a shell variable not set?", ctx, parameter)
            for value in _values(ctx.params.get(name)):
                if isinstance(value, float) and not math.isfinite(value):
                    raise typer.BadParameter(f"{value} is no finite number", ctx, parameter)
        return rest


class Commands(typer.Typer):
    """A group of such commands."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[_Function], _Function]:
        """As Typer's."""
        return super().command(name, cls=Command, **options)


def _values(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        yield from value
    else:
        yield value
