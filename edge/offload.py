"""KV pages on disk: where the file is, what it costs, and who closes it. The work is in plugins/offload."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from edge.errors import EdgeError, UsageError
from plugins.offload.store import DISK_BLOCK, PageFile
from plugins.ort.library import find_library

MIB = 1 << 20


@dataclass(frozen=True)
class Offload:
    """Keep `resident_pages` pages of each layer in memory and all of them in a file in `folder`."""

    folder: Path
    resident_pages: int


def open_page_file(folder: Path, size: int, slice_bytes: int) -> PageFile:
    """A file of `size` bytes that has no name, so that nothing is left of it however the process ends.

    Its space is reserved here: a full disk is found before the work, not in it. `slice_bytes`: the smallest piece of
    memory that a read or write will begin with. EdgeError if the folder, the space or the operators are not there.
    """
    library = find_library()
    if library is None:
        raise EdgeError(
            "--offload needs the compiled operators, which were not built; install g++ and run `pip install -e .`"
        )
    if not folder.is_dir():
        raise UsageError(f"--offload {folder} is no folder; create it, or name one on the disk that is to be used")
    fd = _open_nameless(folder)
    try:
        _reserve(fd, folder, size)
    except BaseException:
        os.close(fd)
        raise
    file = PageFile(library, fd, folder, direct=_make_direct(fd, slice_bytes))
    # At the end of the process too: transfers must not outlive the pools they write to.
    weakref.finalize(file, os.close, fd)
    return file


def _open_nameless(folder: Path) -> int:
    with contextlib.suppress(OSError):  # not every file system can
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fd, name = tempfile.mkstemp(prefix="edge-kv-", dir=folder)
    except OSError as error:
        raise UsageError(f"no file can be made in --offload {folder} ({error.strerror}); name another folder") from None
    os.unlink(name)
    return fd


def _reserve(fd: int, folder: Path, size: int) -> None:
    system = os.fstatvfs(fd)
    free = system.f_bavail * system.f_frsize
    needed = -(-size // MIB)
    remedy = "free some, name a folder on another disk, or ask for a smaller --context"
    if size > free:
        raise EdgeError(f"the KV cache takes {needed}MiB on disk and {folder} has {free // MIB}MiB free; {remedy}")
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno == errno.EFBIG:
            remedy = "raise the limit (ulimit -f), or ask for a smaller --context"
        raise EdgeError(
            f"the {needed}MiB of the KV cache cannot be had in {folder} ({error.strerror}); {remedy}"
        ) from None


def _make_direct(fd: int, slice_bytes: int) -> bool:
    """Let reads and writes go past the system's page cache, if the file system can do that for such slices."""
    import fcntl  # not on every system, and nor are the operators

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        step = min(slice_bytes, DISK_BLOCK)
        with mmap.mmap(-1, DISK_BLOCK) as memory, memoryview(memory) as view:
            os.preadv(fd, [view[start : start + step] for start in range(0, DISK_BLOCK, step)], 0)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True
