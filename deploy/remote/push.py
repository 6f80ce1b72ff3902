"""`deploy/push`: a bundle becomes what a board runs, or everything there stays as it was."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from . import fleet, terminal
from .content import MANIFEST, Settings, read_bundle
from .errors import UsageError
from .service import SCOPES
from .ssh import Address, Connection, Lock
from .steps import STEPS, Push, Wanted, roll_back
from .target import add_target, locate, read_inventory

EXAMPLES = """  deploy/push nvidia@192.168.1.20 bundle-jetson
  deploy/push nvidia@orin.local bundle-jetson --memory 24GiB --service auto
  deploy/push --inventory boards.toml lab robot-7 bundle-jetson
  deploy/push --rollback nvidia@orin.local"""


def main() -> int:
    """The command."""
    return terminal.run(_push)


def _push() -> int:
    options = _parser().parse_args()
    if options.inventory is not None and not options.rollback:
        entries = read_inventory(options.inventory)
        names, bundle = _names(options.words, [entry.name for entry in entries])
        chosen = [entry for entry in entries if entry.name in names]
        return fleet.push(chosen, bundle, _given(options))
    if len(options.words) != (1 if options.rollback else 2):
        raise UsageError("give [USER@]HOST and BUNDLE, or --rollback HOST; see deploy/push --help")
    address, folder = locate(options.words[0], options)
    if options.rollback:
        with Connection(address) as connection, Lock(connection, folder) as lock:
            release = roll_back(connection, lock.folder, options.ready)
        terminal.say(f"active again: release {release}", "green")
        return 0
    return _one(address, folder, _wanted(options))


def _one(address: Address, folder: str, wanted: Wanted) -> int:
    with Connection(address) as connection, Lock(connection, folder) as lock:
        terminal.say(f"[ 1/{len(STEPS)}] connect: {lock.folder} on {address.host} is locked")
        Push(connection, lock.folder, wanted).run()
    return 0


def _wanted(options: argparse.Namespace) -> Wanted:
    chosen = {name: getattr(options, name) for name in ("memory", "context")}
    engine = [word for name, value in chosen.items() if value for word in (f"--{name}", value)]
    lists = [tuple(shlex.split(text)) for text in (options.build, options.serve)]
    settings = Settings(*lists, tuple(engine))
    if any(any(c in word for c in " \t\n\"'\\$") for word in (*settings.serve, *settings.engine)):
        raise UsageError("--serve goes into a systemd unit: no spaces, quotes, $ or \\ inside an option")
    house = options.wheelhouse
    if house is not None and not any(house.glob("*.whl")):
        raise UsageError(f"{house} has no wheels; fill it with: pip download minicpm-edge[serve] --dest {house}")
    return Wanted(
        bundle=read_bundle(Path(options.words[1])),
        settings=settings,
        wheel=options.wheel,
        wheelhouse=house,
        service=options.service,
        memory_max=options.memory_max,
        ready=options.ready,
        bwlimit=options.bwlimit,
        force=options.force,
    )


def _names(words: list[str], known: list[str]) -> tuple[list[str], str | None]:
    """Names of boards, all if none is given, and the bundle, which comes last."""
    bundle = None
    if words and (words[-1] not in known or (Path(words[-1]) / MANIFEST).is_file()):
        *words, bundle = words
    for name in words:
        if name not in known:
            raise UsageError(f"the inventory has no board {name}; it has {', '.join(known)}")
    return words or known, bundle


def _given(options: argparse.Namespace) -> list[str]:
    """Options that hold for every board of a fleet."""
    skipped = ("words", "inventory", "rollback", "force")
    words = ["--force"] if options.force else []
    for name, value in vars(options).items():
        if name not in skipped and value is not None and value != _parser().get_default(name):
            words.append(f"--{name.replace('_', '-')}={value}")
    return words


def _parser() -> argparse.ArgumentParser:
    parser = terminal.parser("Put a bundle on a board, prove that it works there, and activate it.", EXAMPLES)
    add = parser.add_argument
    add("words", nargs="*", metavar="[USER@]HOST BUNDLE", help="the board and the folder that `edge export` wrote")
    add_target(parser)
    add("--rollback", action="store_true", help="no BUNDLE: make the release before the active one active again")
    add("--memory", metavar="SIZE", help="memory budget of the model there, as 24GiB")
    add("--context", metavar="N", help="tokens a conversation may hold")
    add("--wheel", type=Path, metavar="FILE", help="default: the newest of dist/ that fits the board")
    add(
        "--wheelhouse",
        type=Path,
        metavar="FOLDER",
        help="packages for a board without a network (pip download)",
    )
    add("--build", default="", metavar="OPTIONS", help="of `edge build`, as '--batch 1 --verify 12'")
    add("--serve", default="", metavar="OPTIONS", help="of `edge serve`, as '--host 0.0.0.0 --port 8000'")
    add("--service", choices=SCOPES, help="a systemd unit that serves; auto: the system's if there is root")
    add("--memory-max", default="90%", metavar="SIZE", help="the unit's MemoryMax, as 24G (default: 90%%)")
    add(
        "--ready", type=int, default=300, metavar="SECONDS", help="that the server may take until /ready (default: 300)"
    )
    add("--bwlimit", type=int, metavar="KIB_S", help="KiB a second of the transfer, at most")
    add("--force", action="store_true", help="go on although edge doctor found a problem")
    return parser


if __name__ == "__main__":
    sys.exit(main())
