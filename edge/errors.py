"""Errors a user meets. Each message is one sentence: what is wrong, which limit, what to change."""

from __future__ import annotations

from collections.abc import Callable


class EdgeError(Exception):
    """The command was understood but could not be carried out (exit code 1)."""

    exit_code = 1


class UsageError(EdgeError):
    """The command itself is wrong: a bad option, path or type (exit code 2)."""

    exit_code = 2


class NoRoomError(EdgeError):
    """A context that was asked for does not fit. `fitting`: tokens that do; `limit`: of what, in words.

    `needed`: bytes of memory that so many tokens need, and `budget`: those there are; None where it is not for lack of
    memory.
    """

    def __init__(
        self,
        message: str,
        fitting: int,
        limit: str,
        budget: int | None = None,
        needed: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__(message)
        self.fitting, self.limit, self.budget, self.needed = fitting, limit, budget, needed
