"""The command `edge` in a process of its own, for the tests that judge it from outside."""

from __future__ import annotations

import os
import subprocess
import sys

EDGE = [sys.executable, "-m", "edge"]


def edge(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [*EDGE, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=600)
