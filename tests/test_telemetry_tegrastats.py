"""Lines of tegrastats as JetPack 4 to 7 print them, and the command itself."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge.telemetry.reading import Unreadable
from edge.telemetry.recording import choose_total
from edge.telemetry.tegrastats import open_tegrastats, parse_line
from tests.telemetry_samples import LINES

TOTALS = {  # watts: the input where there is one, else the sum of rails that are not behind others
    "AGX Xavier, JetPack 4": 0.463 + 0.618 + 2.936 + 0.309 + 3.306,
    "Xavier NX, JetPack 5": 2.763,
    "AGX Orin, JetPack 5": 2.399 + 0.4 + 4.032,
    "AGX Orin, JetPack 6": 2.412 + 1.607 + 4.607,
    "Orin Nano, JetPack 6": 5.251,
    "Orin NX, JetPack 6": 4.304,
    "AGX Thor, JetPack 7": 4.923 + 4.327,
    "AGX Thor with VIN, JetPack 7": 26.686,
}


@pytest.mark.parametrize("board", LINES)
def test_a_recorded_line_gives_exactly_what_it_says(board: str) -> None:
    line, watts, megahertz, degrees = LINES[board]
    expected: dict[tuple[str, str], float] = {("power", rail): value for rail, value in watts.items()}
    expected |= {("clock", unit): value * 1e6 for unit, value in megahertz.items()}
    expected |= {("temperature", zone): value for zone, value in degrees.items()}
    assert parse_line(line) == pytest.approx(expected)
    reading = parse_line(line)
    total = choose_total(list(reading))
    assert sum(reading[part] for part in total.parts) == pytest.approx(TOTALS[board])


def test_values_of_the_moment_count_not_the_average() -> None:
    reading = parse_line("RAM 1/2MB VDD_IN 16321mW/11204mW/17000mW")
    assert reading == {("power", "VDD_IN"): 16.321}


@pytest.mark.parametrize("gpu", ["0%@1109", "99%@[1109]", "7%@[611,1109]", "@[0,1109,0]", "3%@0 GR3D2_FREQ 3%@1109"])
def test_every_form_of_the_gpus_clock(gpu: str) -> None:
    assert parse_line(f"RAM 1/2MB GR3D_FREQ {gpu} NVENC 78%@166") == {("clock", "GPU"): 1109e6}


@pytest.mark.parametrize(
    "line",
    ["", "tegrastats: command not found", "VDD_IN 1mW/1mW", "RAM 14700/15692MB (lfb 3x2MB) IRAM 0/252kB(lfb 252kB)"],
)
def test_what_is_no_value_gives_none(line: str) -> None:
    assert parse_line(line) == {}


def fake_command(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = folder / "tegrastats"
    command.write_text(f"#!/bin/sh\n{body}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_command_is_read_as_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets its interval in milliseconds; half a line waits for its rest; the newest whole line counts."""
    body = f"""echo "$@" > {tmp_path}/arguments
printf 'RAM 1/2MB VDD_IN 1000mW/1mW\\nRAM 1/2MB VDD_IN 2000mW/1mW\\nRAM 1/2MB VDD_IN 30'
while [ ! -e {tmp_path}/go ]; do sleep 0.02; done
printf '00mW/1mW\\n'
exec sleep 60"""
    fake_command(tmp_path, body, monkeypatch)
    source = open_tegrastats(0.1)

    def next_reading() -> dict[tuple[str, str], float]:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if reading := source.read():
                return dict(reading)
            time.sleep(0.01)
        raise AssertionError("nothing was read")

    try:
        assert next_reading() == {("power", "VDD_IN"): 2.0}
        assert source.read() == {}
        (tmp_path / "go").touch()
        assert next_reading() == {("power", "VDD_IN"): 3.0}
        assert (tmp_path / "arguments").read_text().split() == ["--interval", "100"]
    finally:
        source.close()
    assert source._process.returncode is not None, "the process has ended"


@pytest.mark.parametrize("body", ["exit 1", "echo usage; sleep 60", "exec sleep 60"])
def test_a_command_that_prints_no_values_is_not_read(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_command(tmp_path, body, monkeypatch)
    monkeypatch.setattr("edge.telemetry.tegrastats.PATIENCE", 0.3)
    with pytest.raises(Unreadable, match="tegrastats prints no values"):
        open_tegrastats(0.1)


def test_without_the_command_the_reason_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreadable, match="no tegrastats on the PATH"):
        open_tegrastats(0.1)
