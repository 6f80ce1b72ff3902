"""The ten steps of a push. Each says in a line what came of it; nothing that runs is touched before the ninth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import terminal
from .board import Board, check_board, check_room, read_board
from .content import Bundle, Content, Settings, find_wheel
from .errors import DeployError, UsageError
from .service import render_unit
from .ssh import Connection, Said
from .terminal import say, size

STEPS = ("connect", "check", "transfer", "packages", "doctor", "engine", "selftest", "answer", "activate", "tidy up")
KEEP = 2  # releases: the active one, and the one to go back to
_QUESTION = "Say hello in one short sentence."
_STATES = {"warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Wanted:
    """What the user asked for. service: 'auto', 'user', 'system' or None; ready: seconds that a server may take."""

    bundle: Bundle
    settings: Settings
    wheel: Path | None = None
    wheelhouse: Path | None = None
    service: str | None = None
    memory_max: str = "90%"
    ready: int = 300
    bwlimit: int | None = None
    force: bool = False


class Push:
    """One bundle to one board whose lock is held. folder: on the board, absolute."""

    def __init__(self, connection: Connection, folder: str, wanted: Wanted) -> None:
        self._connection, self._folder, self._wanted = connection, folder, wanted
        self._board: Board
        self._content: Content

    def run(self) -> str:
        """All steps -> the release's ID."""
        bundle = self._wanted.bundle
        with _step("check") as done:
            done(self._check())
        id = self._content.id
        if self._board.current == id and (self._board.unit or not self._wanted.service):
            say(f"already active: {bundle.name}, release {id}", "green")
            return id
        with _step("transfer") as done:
            done(self._transfer())
        with _step("packages") as done:
            done(self._packages())
        with _step("doctor") as done:
            done(self._doctor())
        with _step("engine") as done:
            done(self._engine())
        with _step("selftest") as done:
            done(self._selftest())
        with _step("answer") as done:
            done(self._answer())
        with _step("activate") as done:
            done(self._activate())
        with _step("tidy up") as done:
            removed = self._connection.ask("prune", self._folder, str(KEEP)).split()
            done(f"removed {', '.join(removed)}" if removed else f"the last {KEEP} releases are kept")
        say(f"active: {bundle.name}, release {id}", "green")
        return id

    def _check(self) -> str:
        wanted = self._wanted
        self._board = board = read_board(self._connection.ask("check", self._folder))
        check_board(board, wanted.bundle.target)
        wheel = find_wheel(wanted.wheel, board.architecture, board.python_version)
        self._content = content = Content(wanted.bundle, wheel, wanted.settings, wanted.wheelhouse)
        house = sum(path.stat().st_size for path in wanted.wheelhouse.glob("*")) if wanted.wheelhouse else 0
        new = content.venv not in board.venvs
        for warning in check_room(board, wanted.bundle, content.id, content.wheel_entry.bytes, house, new_venv=new):
            _note("warning", warning)
        if wanted.service == "system" and not board.is_root:
            raise DeployError(
                f"a system unit needs root, and sudo of {board.user} asks for a password; use --service user"
            )
        return board.describe()

    @property
    def _staging(self) -> str:
        return f"{self._folder}/staging/{self._content.id}"

    def _transfer(self) -> str:
        content, bundle = self._content, self._content.bundle
        self._connection.ask("stage", self._folder, content.id, bundle.key, content.wheel_folder, content.sums)
        host, limit = self._connection.address.host, self._wanted.bwlimit
        # --append-verify: what came of a file stays under its name, whatever ends the transfer, and is not sent again.
        common = ["-rLtp", "--chmod=D755,F644", "--append-verify", *([f"--bwlimit={limit}"] if limit else [])]
        sent = 0

        def percent(value: int) -> None:
            terminal.progress(f"transfer: {value} % of {size(bundle.bytes)}")

        for attempt in range(2):
            arguments = [*common, "--files-from=-", f"{bundle.path}/"]
            target = f"{host}:{self._staging}/bundle/"
            sent += self._connection.rsync([*arguments, target], bundle.files, percent)
            terminal.progress(f"comparing {size(bundle.bytes)} by sha256 on the board")
            wrong = self._connection.ask("verify", self._folder, self._staging, content.sums).split()
            if not wrong:
                break
            if attempt:
                raise DeployError(f"{wrong[0]} differs from the bundle's manifest; export the bundle again")
        if content.venv not in self._board.venvs:
            sent += self._send_wheel(common)
        return f"{size(sent)} sent, {size(bundle.bytes + content.wheel_entry.bytes)} there and right"

    def _send_wheel(self, common: list[str]) -> int:
        content, host = self._content, self._connection.address.host
        place = f"{self._folder}/wheels/{content.wheel_folder}"
        sent = self._connection.rsync([*common, str(content.wheel), f"{host}:{place}/"])
        sums = f"{content.wheel_entry.sha256}  {content.wheel.name}"
        if self._connection.ask("verify", self._folder, place, sums).split():
            raise DeployError(f"{content.wheel.name} came damaged; push again")
        if content.wheelhouse is not None:
            sent += self._connection.rsync([*common, f"{content.wheelhouse}/", f"{host}:{self._folder}/wheelhouse/"])
        return sent

    def _packages(self) -> str:
        content = self._content
        is_new = content.venv not in self._board.venvs
        if is_new:
            terminal.progress("installing packages")
            wheel = f"{self._folder}/wheels/{content.wheel_folder}/{content.wheel.name}"
            house = f"{self._folder}/wheelhouse" if content.wheelhouse else ""
            assert self._board.python is not None
            arguments = (content.venv, self._board.python, wheel, content.bundle.extras, house)
            said = self._connection.run("venv", self._folder, *arguments)
            if said.code:
                hint = "" if house else "; a board without a network needs --wheelhouse"
                raise DeployError(f"the packages could not be installed ({said.reason}){hint}")
        self._connection.ask("finish", self._folder, content.id, content.venv, content.settings.environment)
        version = content.wheel.name.split("-")[1]
        return f"minicpm-edge {version} [{content.bundle.extras}], {'installed' if is_new else 'as it was'}"

    def _edge(self, log: str, *arguments: str, on_err: Callable[[str], None] | None = None) -> Said:
        venv = f"{self._folder}/venvs/{self._content.venv}"
        return self._connection.run("edge", self._folder, f"{log}.log", venv, *arguments, on_err=on_err)

    def _edge_json(self, log: str, *arguments: str) -> dict[str, Any]:
        said = self._edge(log, *arguments, "--json")
        if said.code:
            raise DeployError(said.reason)
        return _parse(said)

    @property
    def _staged_bundle(self) -> str:
        return f"{self._staging}/bundle"

    def _doctor(self) -> str:
        said = self._edge("doctor", "doctor", self._staged_bundle, "--json")
        if not said.out.strip():
            raise DeployError(said.reason)
        findings = _parse(said)["findings"]
        problems = []
        for finding in findings:
            status, text = finding["status"], f"{finding['name']}: {finding['found']}"
            if status == "problem":
                problems.append(f"{text}; {finding['remedy']}" if finding["remedy"] else text)
            # That there is no engine yet is what the next step is for.
            if status in _STATES and not (finding["name"] == "engine" and status == "warning"):
                _note(status, f"{text}\n  {finding['remedy']}" if finding["remedy"] else text)
        if problems and not self._wanted.force:
            raise DeployError(f"edge doctor found {len(problems)} problem(s) on the board: {problems[0]}")
        return f"{sum(f['status'] == 'ok' for f in findings)} of {len(findings)} checks are fine"

    def _engine(self) -> str:
        if not self._content.bundle.needs_engine:
            return "none needed: ONNX Runtime on the CPU"
        terminal.progress("building the engine: minutes on a board")
        report = self._edge_json("build", "build", self._staged_bundle, *self._content.settings.build)
        made = "there already" if report["cached"] else f"built in {report['seconds']:.0f} s"
        return f"{Path(report['path']).name}, {size(report['bytes'])}, {made}"

    def _selftest(self) -> str:
        report = self._edge_json("selftest", "selftest", self._staged_bundle)
        vectors = [vector for model in report["models"] for vector in model["vectors"]]
        golden = report["golden"]
        if not report["passed"]:
            raise DeployError("edge selftest failed on the board; see: deploy/logs")
        kernels = f"{len(vectors)} kernel vectors right" if vectors else ""
        tokens = f"{len(golden['expected'])} golden tokens right" if golden else "no golden tokens recorded"
        return ", ".join(filter(None, (kernels, tokens)))

    def _answer(self) -> str:
        bundle, engine = self._staged_bundle, self._content.settings.engine
        if not self._content.bundle.has_text:  # no tokenizer: two random tokens do
            self._edge_json(
                "run", "bench", bundle, "--contexts", "16", "--new-tokens", "2", "--repeat", "1", "--no-gate", *engine
            )
            return "tokens come; the bundle has no tokenizer to ask with"
        words = ("--prompt", _QUESTION, "--temperature", "0", "--max-tokens", "24", *engine)
        reply = self._edge_json("run", "run", bundle, *words)
        if reply["tokens"] < 1:
            raise DeployError("the model gave no answer on the board; see: deploy/logs")
        text = " ".join(str(reply["text"]).split())
        shown = "".join(c if c.isprintable() and c != "\ufffd" else "?" for c in text[:30])
        return f"{shown!r}{'...' if len(text) > 30 else ''} after {reply['first_token_seconds']:.2f} s"

    def _activate(self) -> str:
        wanted, board = self._wanted, self._board
        if wanted.service:
            scope = ("system" if board.is_root else "user") if wanted.service == "auto" else wanted.service
            text = render_unit(scope, self._folder, board.user, wanted.memory_max)
            if note := self._connection.ask("service", self._folder, scope, text).strip():
                _note("warning", note)
        activate(self._connection, self._folder, self._content.id, wanted.ready)
        return (
            f"serving, {wanted.settings.ready_url} says so" if wanted.service or board.unit else "current points to it"
        )


def activate(connection: Connection, folder: str, release: str, ready: int) -> None:
    """Make a release the active one, and have it served if there is a unit; DeployError if all is as it was again."""
    terminal.progress("waiting for the server to be ready")
    said = connection.run("activate", folder, release, str(ready))
    if said.code:
        why = said.reason if "error:" in said.err else f"the server was not ready in {ready} s: {said.reason}"
        raise DeployError(f"{why}; the release before it is active again")


def roll_back(connection: Connection, folder: str, ready: int) -> str:
    """Make the release before the active one the active one -> its ID."""
    current, _, before = connection.ask("before", folder).strip().partition(" ")
    if not before:
        raise DeployError("there is no earlier release on the board to go back to; push the bundle that was there")
    activate(connection, folder, before, ready)
    connection.ask("forget", folder, current)
    return before


def _parse(said: Said) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(said.out)
    except ValueError:
        raise DeployError(f"edge on the board said no JSON ({said.reason}); is its wheel of another version?") from None
    return values


@contextmanager
def _step(name: str) -> Iterator[Callable[[str], None]]:
    """Says a step's result in a line; a failure gets the step's name."""
    start, label = time.monotonic(), f"[{STEPS.index(name) + 1:2}/{len(STEPS)}] {name}"
    terminal.progress(f"{label} ...")

    def done(text: str) -> None:
        terminal.end_progress()
        seconds = time.monotonic() - start
        say(f"{label}: {text}{f' ({seconds:.0f} s)' if seconds >= 1 else ''}")

    try:
        yield done
    except UsageError:
        raise
    except DeployError as error:
        raise DeployError(f"{name}: {error}") from None


def _note(status: str, text: str) -> None:
    terminal.end_progress()
    say(f"        {status}: {text}", _STATES[status])
