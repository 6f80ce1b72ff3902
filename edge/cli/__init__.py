"""The command `edge`: thin commands over build_engine (host) and edge (device)."""

from __future__ import annotations

import os
import sys

import typer

from edge.cli.bench import bench
from edge.cli.console import err
from edge.cli.export import build, export
from edge.cli.generate import chat, run
from edge.cli.logits import logits
from edge.errors import EdgeError

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="edge",
    help="On-device runtime for MiniCPM4: export a checkpoint, build engines, run, chat, measure.\n\n"
    "Add --debug to any command to see where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("export")(export)
app.command("build")(build)
app.command("run")(run)
app.command("chat")(chat)
app.command("logits")(logits)
app.command("bench")(bench)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed or interrupted, 2 wrong use; a traceback only with --debug."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        result = app(arguments, standalone_mode=False, prog_name="edge")
        if result == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(result if isinstance(result, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted", style="bold red")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of a pipe has gone; point stdout elsewhere so that the exit does not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except typer.TyperException as error:  # typer's own words for a wrong option or argument
        _complain("error:", getattr(error, "format_message", error.__str__)())
        sys.exit(2)
    except EdgeError as error:
        if debug:
            raise
        _complain("error:", str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        _complain("internal error:", f"{type(error).__name__}: {error} (run again with --debug for the place)")
        sys.exit(1)


def _complain(kind: str, sentence: str) -> None:
    err.print(kind, style="bold red", end=" ")
    err.print(sentence, markup=False)
