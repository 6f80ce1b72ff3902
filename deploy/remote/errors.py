"""Errors a user meets: one sentence each, and an exit code."""

from __future__ import annotations

INTERRUPTED = 130


class DeployError(Exception):
    """It was understood but could not be done (exit code 1)."""

    exit_code = 1


class UsageError(DeployError):
    """The command itself is wrong (exit code 2)."""

    exit_code = 2
