"""What the quality gate found: whether an engine's tokens can be trusted at all, before its speed is."""

from __future__ import annotations

from dataclasses import dataclass

PASSED, FAILED, NOT_POSSIBLE = "passed", "failed", "not possible"


@dataclass(frozen=True)
class Check:
    """One check: its outcome (PASSED, FAILED or NOT_POSSIBLE) and what was seen, or why it could not be made."""

    name: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class Gate:
    """All checks of a report."""

    checks: tuple[Check, ...]

    @property
    def failure(self) -> str | None:
        """One sentence about the first check that failed; None if none did."""
        failed = next((check for check in self.checks if check.outcome == FAILED), None)
        if failed is None:
            return None
        return f"the quality gate failed: {failed.name}: {failed.detail}; mend that before its speeds are of any use"
