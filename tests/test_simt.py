"""The emulator notices the classic errors of CUDA kernels, one planted at a time; it is silent on the correct kernel.

The kernel is simt_faults.cu. Where the interpreter can see an error too, it must. (spec: kernel_technology.md 3.3)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edge.errors import UsageError
from plugins.launch import Argument, Kernel, Launch
from plugins.simt import KernelFault, Report, emulator
from tests.cuda_routes import ROUTES, run_route

SOURCE = Path(__file__).with_name("simt_faults.cu")
KERNEL = Kernel("../tests/simt_faults.cu", "faulty<128>", "FaultyArguments", threads=128)
GRID = (2, 3, 2)
BLOCKS, THREADS, TILES = 12, 128, 4
SHARED_BYTES = 2 * THREADS * 16 + THREADS * 4
SEEDS = {"fast": range(4), "asan": range(4), "race": range(4), "ptx": range(1)}

WRONG = "wrong"  # no message, but for some seed a wrong result
OVERFLOW = r"heap-buffer-overflow[^$]*simt_faults\.cu:\d+"
LINE = r"tests/simt_faults\.cu:\d+"
RACES = {
    kind: rf"race: {name} of (shared memory|buffer \w+) \+ \d+ by thread \d+ of block \(\d, \d, \d\) at {LINE} and "
    for kind, name in {"RAW": "read after write", "WAR": "write after read", "WAW": "write after write"}.items()
}
EITHER_ORDER = f"({RACES['RAW']}|{RACES['WAR']})"  # which access comes first depends on the seed
EMULATED = ("fast", "asan", "race")


def caught(fast: str, asan: str, race: str, ptx: str = "") -> dict[str, str]:
    """What each route must say; '' where it cannot know."""
    return {route: text for route, text in zip(ROUTES, (fast, asan, race, ptx), strict=True) if text}


def noticed(emulated: str, ptx: str) -> dict[str, str]:
    return caught(emulated, emulated, emulated, ptx)


# Fault of simt_faults.cu -> route -> a pattern of the message.
CAUGHT = {
    "MISSING_BARRIER": caught(WRONG, WRONG, EITHER_ORDER + "(several threads, the last|thread) "),
    "DIVERGENT_BARRIER": noticed(rf"barrier at [\w/.]*{LINE}", "divergent code, reached by 64 of 128"),
    "LANE_LEAVES": noticed(rf"31 of 128 threads wait.*shuffle for lanes 00000020.*{LINE}", "reached by 31 of 32"),
    "THREAD_LEAVES": noticed(rf"barrier at [\w/.]*{LINE}", "reached by 127 of 128"),
    "MISSING_SYNCWARP": caught(WRONG, WRONG, EITHER_ORDER),
    "MASK_WITHOUT_SELF": noticed(rf"lane \d+ takes part in a shuffle whose mask 0000ffff.*{LINE}", "only some lanes"),
    "SHUFFLE_OUTSIDE_MASK": noticed(r"shuffle reads lane \d+, which is not in its mask", "divergent code"),
    "DIFFERENT_COLLECTIVES": noticed(r"different collectives: (vote .* and shuffle|shuffle .* and vote)", "divergent"),
    "WRITTEN_WHILE_WARP_READS": caught("", "", EITHER_ORDER),
    "WRITTEN_WHILE_BLOCK_READS": caught("", "", EITHER_ORDER),
    "BYTE_BEFORE_WORD": caught("", "", "race: .*shared memory"),
    "BYTE_AFTER_WORD": caught("", "", "race: .*shared memory"),
    "SHARED_READ_PAST_END": caught(WRONG, OVERFLOW, rf"read of 4 .* shared memory, which.*{LINE}", "shared read of 4"),
    "SHARED_WRITE_PAST_END": caught(
        "past the end of shared memory", OVERFLOW, rf"write of 4 .* shared memory, which.*{LINE}", "shared write of 4"
    ),
    "NEVER_WAITED": noticed("copies still in flight", "copies under way"),
    "COPIES_IN_FLIGHT": noticed("copies still in flight", "copies under way"),
    "WAITED_FOR_TOO_FEW": noticed(WRONG, WRONG),
    "MISSING_BARRIER_AFTER_WAIT": caught(WRONG, WRONG, EITHER_ORDER),
    "MISSING_BARRIER_BEFORE_REFILL": caught(WRONG, WRONG, EITHER_ORDER),
    "MISALIGNED_COPY": noticed(rf"cp\.async to shared memory.*16 bytes.*thread 70 at {LINE}", "misaligned shared"),
    "MISALIGNED_ROW": noticed(rf"ldmatrix: the row of lane 8 is not aligned.*thread 40 at {LINE}", "misaligned shared"),
    "TWO_THREADS_ONE_WORD": caught(WRONG, WRONG, RACES["WAW"] + "thread "),
    "TWO_BLOCKS_ONE_WORD": caught(WRONG, WRONG, RACES["WAW"] + "block number 2"),
    "READ_OF_EARLIER_BLOCK": caught(WRONG, WRONG, RACES["RAW"] + "block number 1"),
    "READ_OF_LATER_BLOCK": caught(WRONG, WRONG, RACES["WAR"] + "block number 1"),
    "ATOMIC_AND_PLAIN": caught(WRONG, WRONG, RACES["WAW"] + "thread "),
    "READ_PAST_END": caught(WRONG, OVERFLOW, rf"read of 4 bytes at \+6144 of buffer x,.*{LINE}", "byte 6144 of 'x'"),
    "WRITE_PAST_END": caught(
        r"past the end of buffer sums \(48 bytes\)",
        OVERFLOW,
        rf"write of 4 bytes at \+48 of buffer sums, which.*{LINE}",
        "byte 48 of 'sums'",
    ),
    "MISALIGNED_VECTOR": caught("", rf"{LINE}.*misaligned address", RACES["WAW"], "misaligned global"),
}
BODY = re.sub(r"//.*", "", SOURCE.read_text())
FAULTS = re.findall(r"\w+", BODY[BODY.index("enum Fault {") + 12 : BODY.index("};")])


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.integers(-50, 50, (BLOCKS, THREADS)).astype(np.float32),
        "tiles": rng.integers(0, 2**32, (BLOCKS, TILES, THREADS, 4), dtype=np.uint32),
        "out": np.full((BLOCKS, THREADS, 4), 0xFFFFFFFF, np.uint32),
        "sums": np.full(BLOCKS, np.nan, np.float32),
        "count": np.zeros(1, np.int32),
    }


def launch(fault: str = "NONE", arguments: tuple[Argument, ...] = ("x", "tiles", "out", "sums", "count")) -> Launch:
    return Launch(KERNEL, GRID, (*arguments, np.int32(FAULTS.index(fault))), SHARED_BYTES)


def expected(buffers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the correct kernel makes of the inputs."""
    tiles = buffers["tiles"].sum(axis=1, dtype=np.uint32)
    loaded = np.roll(tiles, -32, axis=1)
    matrix = np.concatenate([loaded.reshape(BLOCKS, 32, 4, 4), loaded.reshape(BLOCKS, 32, 4, 4)[..., ::-1]], axis=2)
    halves = matrix.view(np.uint16).reshape(BLOCKS, 32, 8, 8)  # block, row, piece of 16 bytes, element
    out = np.empty((BLOCKS, 4, 32, 4), np.uint32)
    for warp in range(4):
        for word, (piece, rows, transposed) in enumerate(
            [(2 * warp, 0, False), (2 * warp, 24, False), (2 * warp + 1, 0, True), (2 * warp + 1, 24, True)]
        ):
            part = halves[:, rows : rows + 8, piece]
            part = part.swapaxes(1, 2) if transposed else part
            out[:, warp, :, word] = np.ascontiguousarray(part).view(np.uint32).reshape(BLOCKS, 32)
    return {
        "x": buffers["x"],
        "tiles": buffers["tiles"],
        "out": out.reshape(BLOCKS, THREADS, 4),
        "sums": buffers["x"].sum(axis=1),
        "count": np.array([BLOCKS * THREADS], np.int32),
    }


def run(fault: str, route: str, seed: int) -> tuple[bool, Report]:
    """-> whether the results are right"""
    buffers, want = inputs(), expected(inputs())
    report = run_route(route, [launch(fault)], buffers, seed)
    return all(np.array_equal(buffers[name], want[name]) for name in want), report


@pytest.mark.parametrize("route", ROUTES)
def test_the_correct_kernel_is_right_and_silent(route: str) -> None:
    for seed in SEEDS[route]:
        right, report = run("NONE", route, seed)
        assert right, seed
        assert report.bank_conflicts == 0


@pytest.mark.parametrize(("fault", "route"), [(fault, route) for fault, routes in CAUGHT.items() for route in routes])
def test_planted_faults_are_caught(fault: str, route: str) -> None:
    pattern, wrong = CAUGHT[fault][route], 0
    for seed in SEEDS[route]:
        try:
            wrong += not run(fault, route, seed)[0]
        except KernelFault as error:
            assert re.search(pattern, str(error), re.DOTALL), (seed, str(error))
        else:
            assert pattern == WRONG, f"seed {seed} is not caught"
    assert pattern != WRONG or wrong


def test_every_planted_fault_is_tried() -> None:
    assert set(FAULTS) == {"NONE", "NOT_SWIZZLED", *CAUGHT}


@pytest.mark.parametrize("route", ROUTES)
def test_a_lost_swizzle_shows_as_bank_conflicts(route: str) -> None:
    """Eight wavefronts instead of one, for four matrices of two ldmatrix of four warps."""
    right, report = run("NOT_SWIZZLED", route, 0)
    assert right
    assert report.bank_conflicts == (8 - 1) * 4 * 2 * 4 * BLOCKS


@pytest.mark.parametrize("route", ["race", "ptx"])
def test_bytes_are_counted_by_buffer(route: str) -> None:
    _, report = run("NONE", route, 0)
    sizes = {name: array.nbytes for name, array in inputs().items()}
    once = dict.fromkeys(sizes, 0)
    assert report.read == once | {name: sizes[name] for name in ("x", "tiles")}
    assert report.written == once | {name: sizes[name] for name in ("out", "sums")} | {"count": BLOCKS * THREADS * 4}


@pytest.mark.parametrize("route", ROUTES)
def test_a_struct_of_another_size_is_refused(route: str) -> None:
    buffers = inputs()
    with pytest.raises((KernelFault, UsageError), match=r"40 bytes|struct of 48 bytes"):
        run_route(route, [launch(arguments=("x", "tiles", "out", "sums"))], buffers)


@pytest.mark.parametrize("route", ROUTES)
def test_after_a_fault_the_buffers_are_as_before(route: str) -> None:
    """Also what an earlier, correct launch wrote; the message names the kernel that failed."""
    buffers = inputs()
    with pytest.raises(KernelFault, match="faulty_128"):
        run_route(route, [launch(), launch("NEVER_WAITED")], buffers)
    for name, before in inputs().items():
        assert buffers[name].tobytes() == before.tobytes(), name


@pytest.mark.parametrize("route", ROUTES)
def test_launches_run_in_order_on_buffers_of_any_name(route: str) -> None:
    """What one launch wrote another may read: two runs of the kernel count twice and are no race."""
    names = {"x": "the rows", "tiles": "tiles 1", "out": "", "sums": "sums\n", "count": "buffer 0"}
    buffers = {names[name]: array for name, array in inputs().items()}
    run_route(route, [launch(arguments=tuple(names.values()))] * 2, buffers, 1 if route != "ptx" else 0)
    assert buffers["buffer 0"][0] == 2 * BLOCKS * THREADS
    np.testing.assert_array_equal(buffers["sums\n"], expected(inputs())["sums"])


def test_null_pointers_fault() -> None:
    arguments = (None, "tiles", "out", "sums", "count")
    for route, said in {"fast": "SIGSEGV", "asan": "null pointer|SEGV", "ptx": "null pointer"}.items():
        with pytest.raises(KernelFault, match=said):
            run_route(route, [launch(arguments=arguments)], inputs())


def test_wrong_use_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'debug'.*fast, asan, race"):
        emulator.run([launch()], inputs(), build="debug")
    buffers = inputs()
    buffers["x"] = np.zeros((THREADS, BLOCKS), np.float32).T
    with pytest.raises(UsageError, match="buffer 'x' is not C-contiguous"):
        emulator.run([launch()], buffers)
