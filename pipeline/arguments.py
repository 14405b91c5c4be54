"""What all commands have in common: what they refuse before they run, and how their help is laid out."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import TyperPath

from pipeline.errors import UsageError

_Function = TypeVar("_Function", bound=Callable[..., Any])


#: A larger whole number is none that somebody meant, and C has no place for it.
_LARGEST = (1 << 31) - 1


class Command(TyperCommand):
    """A command whose options and arguments all have a value.

    An empty one is a shell variable that is not set; as a path it would mean the current folder. `~` is replaced by
    the shell, but neither in quotes nor behind `=`, nor in `.env`: as a path it would mean a folder of that name. NaN
    passes every comparison with a least and a greatest value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises:
            BadParameter: one is empty, a path begins with `~/`, or a number is NaN, infinite or too large.
        """
        given = self.make_parser(ctx).parse_args(list(args))[0]
        rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            name = parameter.name or ""
            if "" in _values(given.get(name)):
                raise typer.BadParameter("it is empty; is a shell variable not set?", ctx, parameter)
            if isinstance(parameter.type, TyperPath):
                for value in _values(given.get(name) or parameter.value_from_envvar(ctx)):
                    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
                        raise typer.BadParameter(_home(value), ctx, parameter)
            for value in _values(ctx.params.get(name)):
                if isinstance(value, float) and not math.isfinite(value):
                    raise typer.BadParameter(f"{value} is not a finite number", ctx, parameter)
                if isinstance(value, int) and abs(value) > _LARGEST:
                    raise typer.BadParameter(f"it is beyond {_LARGEST}, and no such number is", ctx, parameter)
        return rest

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog line by line under "Examples", each as it can be typed."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Group(TyperGroup):
    """A group whose help lists its commands under their `rich_help_panel`.

    Typer does so only with rich, whose table of options leaves 18 of 80 columns to what an option does, and takes a
    `[default: …]` in a help text for markup.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; without any, show the help on stderr and end with exit code 2."""
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            ctx.exit(UsageError.exit_code)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per panel, panels and commands in the order in which they were added."""
        shown = {name: command for name, command in self.commands.items() if not command.hidden}
        width = max(map(len, shown), default=0)
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in shown.items():
            panel = getattr(command, "rich_help_panel", None)
            text = command.get_short_help_str(formatter.width - width - 4)
            panels.setdefault(panel if isinstance(panel, str) else "Commands", []).append((name.ljust(width), text))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


class Panel(StrEnum):
    """The groups of commands in `ruiji --help`."""

    embed = "Embed images"
    check = "Check and look"
    search = "Search"


class Commands(typer.Typer):
    """Commands that are grouped like that and refuse the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Group, **options)

    def command(
        self, name: str | None = None, *, panel: Panel | None = None, examples: Sequence[str] = (), **options: Any
    ) -> Callable[[_Function], _Function]:
        """As Typer's.

        Args:
            panel: where `ruiji --help` lists the command.
            examples: command lines that its own help shows.
        """
        epilog = "\n".join(examples)
        return super().command(name, cls=Command, rich_help_panel=panel, epilog=epilog, **options)


def _values(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        yield from value
    else:
        yield value


def _home(path: str) -> str:
    return (
        f"no shell has replaced the ~ of {path}: none does in quotes, behind = or in .env; "
        f"write ${{HOME}}{path[1:]}, or ./{path} for a folder named ~"
    )
