"""A command that is more than one: itself, and subcommands."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class CommandWithSubcommands(TyperGroup):
    """A command whose first word may be a subcommand; any other line is the command's own, options in any place.

    A folder or file named as a subcommand is reached as ./NAME. The command's function is called first in either case,
    and has nothing to do if its context has an `invoked_subcommand`.
    """

    allow_extra_args = False
    allow_interspersed_args = True

    def get_params(self, ctx: Any) -> list[Any]:
        """A subcommand's usage line asks with its own context, and does not take this command's arguments."""
        params = super().get_params(ctx)
        return params if ctx.command is self else [p for p in params if p.param_type_name != "argument"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            return super().parse_args(ctx, args)
        super().parse_args(ctx, [])  # the command's own parameters have their defaults
        ctx._protected_args, ctx.args = args[:1], args[1:]  # where TyperGroup keeps the subcommand and its words
        return ctx.args
