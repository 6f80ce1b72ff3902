"""Errors a user meets. Each message is one sentence: what is wrong, which limit, what to change."""


class EdgeError(Exception):
    """The command was understood but could not be carried out (exit code 1)."""

    exit_code = 1


class UsageError(EdgeError):
    """The command itself is wrong: a bad option, path or type (exit code 2)."""

    exit_code = 2
