"""Lines for the person at the terminal: plain where they go into a pipe or NO_COLOR is set."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

from .errors import INTERRUPTED, DeployError

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


def styled(text: str, style: str, stream: object = None) -> str:
    """The text in a colour, if whoever reads the stream (standard output) sees colours."""
    target = stream or sys.stdout
    if os.environ.get("NO_COLOR") or not getattr(target, "isatty", lambda: False)():
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def say(text: str, style: str | None = None) -> None:
    """A line of the result."""
    print(styled(text, style) if style else text, flush=True)


def complain(text: str) -> None:
    """A failure, on standard error."""
    print(f"{styled('error:', 'red', sys.stderr)} {' '.join(text.split())}", file=sys.stderr, flush=True)


def progress(text: str) -> None:
    """A line that the next one replaces; nothing where nobody watches."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text[:79]}", end="", flush=True)


def end_progress() -> None:
    """The line is gone."""
    progress("")


def size(count: float) -> str:
    """Bytes as '7.4 GiB', '12.0 MiB', '3 KiB'."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser in which no option may be shortened."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(command: Callable[[], int]) -> int:
    """A command's exit code; its failure becomes one sentence."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return command()
    except DeployError as error:
        end_progress()
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        end_progress()
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # who read the output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(f"cannot use {error.filename or 'the output'} ({error.strerror}); check the path and its permissions")
        return 1
