"""`edge chat --mcp`: a model that calls tools of a real server, from fixed tokens and through the command."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge.cli.chat import Speaker, take_turn
from edge.cli.tool_use import ToolUse
from edge.sampler import SamplingParams
from edge.session import TokenEvent
from edge.toolbox.servers import open_toolbox
from tests.command import EDGE, edge
from tests.scripted_model import ASKED, TOLD, write_scripted_bundle
from tests.test_chat import CTRL_C, CTRL_D, own_terminal, press_until, read_until
from tests.test_text import tokenizer_of
from tests.test_tool_prompt import PLAIN
from tests.test_toolbox import ROOT, SERVER, sample_server

CALL = "Let me add.\n<|tool_call_start|>\n```python\nadd(a=2,b=3)\n```\n<|tool_call_end|>"


class FixedSession:
    """A session whose replies are written beforehand; what it was asked is kept as text."""

    def __init__(self, replies: Sequence[str]) -> None:
        self.tokenizer, self.replies, self.prompts = tokenizer_of("byte_level", PLAIN), iter(replies), list[str]()
        self.speculated = None

    def generate(
        self, ids: Sequence[int], params: SamplingParams, progress: Any = None
    ) -> Generator[TokenEvent, None, None]:
        self.prompts.append(self.tokenizer.model.decode(list(ids), skip_special_tokens=False))
        for token in self.tokenizer.encode(next(self.replies), add_bos=False):
            yield TokenEvent(token, None)
        yield TokenEvent(self.tokenizer.model.token_to_id("<|im_end|>"), "stop")


def test_fixed_tokens_and_a_real_server(capsys: pytest.CaptureFixture[str]) -> None:
    session = FixedSession(["<|thought_start|>\nI add.\n<|thought_end|>\n" + CALL, "<think>hm</think>Five."])
    with open_toolbox([sample_server()], seconds=20) as box:
        use = ToolUse(box, session.tokenizer, 3, 100)
        speaker = Speaker(session, session.tokenizer, SamplingParams(), None, use.tools)  # type: ignore[arg-type]
        turn: list[Any] = [{"role": "user", "content": "2+3?"}]
        use.allowed.add(("sums", "add"))
        assert take_turn(speaker, use, turn)
    call_id = turn[1]["tool_calls"][0]["id"]
    function = {"name": "add", "arguments": '{"a": 2, "b": 3}'}
    assert turn[1:] == [
        {
            "role": "assistant",
            "content": "Let me add.",
            "reasoning_content": "I add.",
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "name": "add", "content": "The sum is 5."},
        {"role": "assistant", "content": "Five.", "reasoning_content": "hm"},
    ]
    assert "def add(a, b):" in session.prompts[0] and "<|tool_call_end|>\nLet me add.<|im_end|>" in session.prompts[1]
    assert session.prompts[1].endswith("<|im_start|>tool\nThe sum is 5.<|im_end|>\n<|im_start|>assistant\n")
    shown = capsys.readouterr()
    assert shown.out == "Let me add.\nFive.\n" and "I add." in shown.err and "tool_call" not in shown.out + shown.err


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that adds two and three when it is asked, and then says what came of it."""
    return write_scripted_bundle(tmp_path_factory.mktemp("adder"), {ASKED: CALL, TOLD: "It is five."})


def write_servers(folder: Path, *arguments: str) -> Path:
    path = folder / "mcp.json"
    servers = {"sums": {"command": sys.executable, "args": list(arguments or SERVER), "env": {"PYTHONPATH": ROOT}}}
    path.write_text(json.dumps({"mcpServers": servers}))
    return path


def test_calls_through_the_command(adder: Path, tmp_path: Path) -> None:
    """Allowed, denied, and always from then on; the kept conversation goes on without the server."""
    servers, file = write_servers(tmp_path), tmp_path / "adder.session"
    lines = b"2+3?\ny\nagain\nn\n\nand again\na\nonce more\n"
    result = edge("chat", adder, "--mcp", servers, "--temperature", 0, "--save", file, stdin=lines)
    assert result.returncode == 0, result.stderr
    assert result.stdout == b"Let me add.\nIt is five.\n" * 4
    shown = result.stderr.decode()
    assert "tools: sums: add, sums: fail" in shown and shown.count("sums: add\n  a = 2\n  b = 3\n") == 4
    assert shown.count("not called") == 1
    rest = edge("chat", adder, "--restore", file, "--temperature", 0, stdin=b"and now?\n")
    assert rest.returncode == 0 and rest.stdout.decode() == CALL + "\n"  # without tools a call is just text


def test_a_model_that_only_calls_meets_the_limit(tmp_path: Path) -> None:
    bundle = write_scripted_bundle(tmp_path, {ASKED: CALL, TOLD: CALL})
    result = edge("chat", bundle, "--mcp", write_servers(tmp_path), "--tool-rounds", 2, stdin=b"2+3?\na\n")
    assert result.returncode == 0
    assert result.stdout == b"Let me add.\n" * 3 and result.stderr.count(b"  a = 2\n") == 2


def test_a_server_that_does_not_start_ends_the_command(adder: Path, tmp_path: Path) -> None:
    failing = edge("chat", adder, "--mcp", write_servers(tmp_path, "-c", "raise SystemExit('out of order')"))
    assert failing.returncode == 1 and b"the MCP server sums" in failing.stderr and b"out of order" in failing.stderr
    missing = edge("chat", adder, "--mcp", tmp_path / "none.json")
    assert missing.returncode == 2 and b"give a JSON file with mcpServers" in missing.stderr


@pytest.fixture
def slow_call(tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes], Path]]:
    """Our end of a terminal in which the model calls a tool that does not come back, and the file where it says so."""
    mark = tmp_path / "began"
    call = f"<|tool_call_start|>\n```python\nslow(mark={json.dumps(str(mark))})\n```\n<|tool_call_end|>"
    bundle = write_scripted_bundle(tmp_path, {ASKED: call, TOLD: "Well."})
    ours, theirs = pty.openpty()
    command = [*EDGE, "chat", str(bundle), "--mcp", str(write_servers(tmp_path)), "--temperature", "0"]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=own_terminal
    )
    os.close(theirs)
    try:
        read_until(ours, "> $")
        yield ours, process, mark
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_stops_a_question_and_a_call(slow_call: tuple[int, subprocess.Popen[bytes], Path]) -> None:
    keys, process, mark = slow_call
    os.write(keys, b"go\n")
    read_until(keys, r"lways\): $")
    press_until(keys, CTRL_C, r"stopped\s+> $")
    assert not mark.exists()
    os.write(keys, b"go\n")
    read_until(keys, r"lways\): $")
    os.write(keys, b"y\n")
    deadline = time.monotonic() + 30
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    press_until(keys, CTRL_C, r"stopped\s+> $")
    os.write(keys, CTRL_D)
    assert process.wait(30) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
