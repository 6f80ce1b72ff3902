"""The commands under one name, and how their failures are told."""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from edge.cli.bench import bench
from edge.cli.build import build
from edge.cli.chat import chat
from edge.cli.compare import compare
from edge.cli.console import err, out
from edge.cli.doctor import doctor
from edge.cli.eval import evaluate
from edge.cli.export import export
from edge.cli.freq import freq
from edge.cli.generate import run
from edge.cli.groups import CommandWithSubcommands
from edge.cli.logits import logits
from edge.cli.mapreduce import mapreduce
from edge.cli.plan import plan
from edge.cli.quantize import quantize
from edge.cli.selftest import selftest
from edge.cli.serve import serve
from edge.errors import EdgeError

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="edge",
    help="On-device runtime for MiniCPM4: plan, quantise, export, build engines, run, chat, serve, measure.\n\n"
    "Add --debug to any command to see where an error came from.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("plan")(plan)
app.command("quantize")(quantize)
app.command("freq")(freq)
app.command("export")(export)
app.command("build")(build)
app.command("run")(run)
app.command("chat")(chat)
app.command("mapreduce")(mapreduce)
app.command("logits")(logits)
app.command("serve")(serve)
bench_commands = typer.Typer(cls=CommandWithSubcommands, invoke_without_command=True, subcommand_metavar="")
bench_commands.callback()(bench)
bench_commands.command("compare")(compare)
app.add_typer(bench_commands, name="bench")
app.command("eval")(evaluate)
app.command("doctor")(doctor)
app.command("selftest")(selftest)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        out.print(f"minicpm-edge {version('minicpm-edge')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False)
        raise typer.Exit(2)


def run_command(arguments: list[str], *, debug: bool) -> int:
    """Run one command -> exit code; whatever goes wrong becomes one sentence on stderr, unless `debug`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows few characters shows ? for the rest
    try:
        result = app(arguments, standalone_mode=False, prog_name="edge")
        if sys.stdout is not None:
            sys.stdout.flush()
    except typer.TyperException as error:  # typer's own words for a wrong option or argument
        return _complain(getattr(error, "format_message", error.__str__)(), 2)
    except EdgeError as error:
        if debug:
            raise
        return _complain(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        if error.filename is None:
            _drop_output()
        if isinstance(error, BrokenPipeError):
            return 1  # who read the output has had enough of it
        where = f"cannot use {error.filename}" if error.filename else "cannot write the output"
        return _complain(f"{where} ({error.strerror}); check the path, its permissions and the space there", 1)
    except Exception as error:
        if debug:
            raise
        words = f"{type(error).__name__}: {error} (run again with --debug for the place)"
        return _complain(words, 1, "internal error:")
    if result == INTERRUPTED:
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _complain(sentence: str, exit_code: int, kind: str = "error:") -> int:
    err.print(kind, style="bold red", end=" ")
    err.print(" ".join(sentence.splitlines()), markup=False)
    return exit_code


def _drop_output() -> None:
    """What stdout could not take must not be tried again at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
