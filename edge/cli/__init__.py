"""The command `edge`: thin commands over build_engine (host) and edge (device)."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed or interrupted, 2 wrong use; a traceback only with --debug."""
    for name in ("SIGTERM", "SIGHUP"):  # whoever stops it or closes its terminal wants it to clean up as after Ctrl-C
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        # Loaded here, so that Ctrl-C is met with one word from the first moment.
        from edge.cli.app import run_command

        sys.exit(run_command(arguments, debug=len(arguments) < len(sys.argv) - 1))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)
