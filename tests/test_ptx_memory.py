"""Loads, stores, atomics and asynchronous copies of interpreted PTX: values, exact byte counts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import UsageError
from plugins.simt import KernelFault
from plugins.simt.interpreter import PtxFault
from tests.ptx_programs import compute, run_text

few = settings(max_examples=15, deadline=None)
THREAD_16 = "mul.wide.u32 %rd8, %r0, 16; add.s64 %rd6, %rd0, %rd8; add.s64 %rd7, %rd1, %rd8;"


@pytest.mark.parametrize(
    ("load", "store", "registers"),
    [
        ("ld.global.v4.u32", "st.global.v4.b32", "%r1, %r2, %r3, %r4"),
        ("ld.global.nc.L1::no_allocate.v4.u32", "st.global.cs.v4.u32", "%r1, %r2, %r3, %r4"),
        ("ld.global.nc.L1::no_allocate.L2::128B.v2.b64", "st.volatile.global.v2.u64", "%rd2, %rd3"),
        ("ld.volatile.global.v4.f32", "st.v4.f32", "%r1, %r2, %r3, %r4"),
        ("ld.relaxed.gpu.global.v4.b32", "st.release.cta.global.v4.b32", "%r1, %r2, %r3, %r4"),
    ],
)
def test_vectors_move_every_byte(load: str, store: str, registers: str) -> None:
    source = np.random.default_rng(0).integers(0, 256, 512, np.uint8)
    target = np.zeros_like(source)
    text = f"{THREAD_16} {load} {{{registers}}}, [%rd6]; {store} [%rd7], {{{registers}}}; ret;"
    report = run_text(text, {"source": source, "target": target})
    np.testing.assert_array_equal(target, source)
    assert report.read == {"source": 512, "target": 0}
    assert report.written == {"source": 0, "target": 512}


def test_narrow_loads_extend_and_narrow_stores_cut() -> None:
    source = np.arange(0, 256, 8, dtype=np.uint8)
    buffers = {"source": source, "bytes": np.zeros(32, np.uint8), "wide": np.zeros(32, np.int32)}
    run_text(
        "cvt.u64.u32 %rd3, %r0; add.s64 %rd4, %rd0, %rd3; ld.global.s8 %r1, [%rd4]; ld.global.u8 %h1, [%rd4];"
        "add.s64 %rd4, %rd1, %rd3; add.u16 %h1, %h1, 0x0107; st.global.u8 [%rd4], %h1;"
        "shl.b64 %rd5, %rd3, 2; add.s64 %rd5, %rd2, %rd5; st.global.u32 [%rd5], %r1; ret;",
        buffers,
    )
    np.testing.assert_array_equal(buffers["bytes"], source + np.uint8(7))
    np.testing.assert_array_equal(buffers["wide"], source.view(np.int8))


def test_reaching_past_a_buffer_names_it() -> None:
    """The last thread reads 16 bytes of a buffer that is 4 too short, in one block of several."""
    buffers = {"x": np.zeros(127, np.uint32), "y": np.zeros(128, np.uint32)}
    text = f"{THREAD_16} ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd6]; ret;"
    message = (
        r"k, thread 31 of block \(0, 0, 0\): global read of 16 bytes at byte 496 of 'x', which has 508 bytes in `ld"
    )
    with pytest.raises(PtxFault, match=message):
        run_text(text, buffers, grid=(3, 1, 1))
    assert issubclass(PtxFault, KernelFault)


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ("st.global.u32 [%rd0+-4], %r0", "global write of 4 bytes at byte -4 of 'x'"),
        ("ld.global.u32 %r1, [%rd0+128]", "global read of 4 bytes at byte 128 of 'x'"),
        ("ld.global.u32 %r1, [%rd0+2]", "misaligned global access of 4 bytes"),
        ("ld.global.v2.u32 {%r1, %r2}, [%rd0+4]", "misaligned global access of 8 bytes"),
        ("mov.u64 %rd1, 8; ld.global.u32 %r1, [%rd1]", "null pointer"),
        ("mov.u64 %rd1, -8; ld.global.u32 %r1, [%rd1]", "far from every buffer"),
        ("cvt.u32.u64 %r1, %rd0; cvt.u64.u32 %rd1, %r1; st.global.u32 [%rd1], 0", "null pointer|far from every"),
        ("atom.global.add.u32 %r1, [%rd0+128], 1", "at byte 128 of 'x'"),
        ("st.shared.u32 [shared+64], 0", "shared write of 4 bytes at byte 64; the launch gives a block 64 bytes"),
        ("st.shared.v2.u32 [shared+60], {%r0, %r0}", "shared write of 8 bytes at byte 60"),
        ("mov.u32 %r1, 0; ld.shared.u32 %r1, [%r1]", "shared read of 4 bytes at byte -"),
        ("ld.shared.u32 %r1, [shared+6]", "misaligned shared access"),
        ("cp.async.cg.shared.global [shared], [%rd0+120], 16", "at byte 120 of 'x'"),
        ("cp.async.cg.shared.global [shared+56], [%rd0], 16", "shared write of 16 bytes at byte 56"),
        ("cp.async.cg.shared.global [shared+8], [%rd0], 16", "misaligned shared"),
        ("cp.async.cg.shared.global [shared], [%rd0], 16, 8", "only none or all"),
        ("ld.param.u64 %rd1, [k_param_0+8]", "a struct of 8 bytes"),
        ("ld.local.u32 %r1, [%r0]", "local memory"),
        ("st.global.f32 [table], %r0", "unknown name table"),
    ],
)
def test_bad_accesses_are_refused(access: str, message: str) -> None:
    x = np.arange(32, dtype=np.uint32)
    with pytest.raises(PtxFault, match=message):
        run_text(f"st.global.u32 [%rd0], 77; {access}; ret;", {"x": x}, shared_bytes=64)
    np.testing.assert_array_equal(x, np.arange(32))  # nothing half-written


def test_threads_whose_guard_fails_access_nothing() -> None:
    """One thread of 32 stores, one copies; for the others the addresses would be far outside."""
    x, y = np.zeros(2, np.uint32), np.arange(4, dtype=np.uint32)
    report = run_text(
        "mul.wide.u32 %rd2, %r0, 4096; add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2; setp.eq.u32 %p1, %r0, 0;"
        "shl.b32 %r3, %r0, 4; mov.u32 %r2, shared; add.u32 %r2, %r2, %r3;"
        "@%p1 st.global.u32 [%rd3], 9; @%p1 cp.async.ca.shared.global [%r2], [%rd4], 16;"
        "@!%p1 atom.shared.add.u32 %r5, [shared+16], 1; cp.async.wait_all;"
        "@%p1 ld.shared.u32 %r4, [shared+12]; @%p1 st.global.u32 [%rd3+4], %r4; ret;",
        {"x": x, "y": y},
        shared_bytes=20,
    )
    assert x.tolist() == [9, 3]
    assert (report.written["x"], report.read["y"]) == (8, 16)


def test_shared_memory_and_registers_start_poisoned() -> None:
    """In every block of several batches, whatever the blocks before have left."""
    x = np.zeros((300, 2), np.uint32)
    run_text(
        "mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd1, %r2, 8; add.s64 %rd1, %rd0, %rd1; ld.shared.u32 %r1, [shared+4];"
        "st.global.u32 [%rd1], %r1; st.global.u32 [%rd1+4], %r7; mov.u32 %r7, 5; bar.sync 0;"
        "st.shared.u32 [shared+4], %r7; ret;",
        {"x": x},
        grid=(300, 1, 1),
        shared_bytes=8,
    )
    assert (x == 0xFFFFFFFF).all()


def test_blocks_have_their_own_shared_memory() -> None:
    """130 blocks (several batches): each counts its threads and sees no other's count."""
    x = np.zeros(130, np.uint32)
    run_text(
        "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [shared], 0; bar.sync 0; atom.shared.add.u32 %r1, [shared], 1;"
        "bar.sync 0; ld.shared.u32 %r2, [shared]; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %ctaid.x;"
        "mad.lo.u32 %r3, %r3, %r4, %r5; mul.wide.u32 %rd1, %r3, 4; add.s64 %rd1, %rd0, %rd1;"
        "mad.lo.u32 %r2, %r3, 1000, %r2; @%p1 st.global.u32 [%rd1], %r2; ret;",
        {"x": x},
        threads=96,
        grid=(13, 10, 1),
        shared_bytes=4,
    )
    np.testing.assert_array_equal(x, np.arange(130) * 1000 + 96)


def test_generic_addresses() -> None:
    """A generic pointer into shared memory, and back."""
    x = np.zeros(2, np.uint32)
    run_text(
        "mov.u64 %rd1, shared; cvta.shared.u64 %rd1, %rd1; st.u32 [%rd1+4], 5; cvta.to.shared.u64 %rd2, %rd1;"
        "ld.shared.u32 %r1, [%rd2+4]; cvta.to.global.u64 %rd3, %rd0; st.global.u32 [%rd3], %r1; ld.u32 %r2, [%rd1+4];"
        "st.u32 [%rd0+4], %r2; ret;",
        {"x": x},
        shared_bytes=8,
    )
    assert x.tolist() == [5, 5]


ATOMICS = {
    "add.u32": lambda old, new: (old + new) % 2**32,
    "max.s32": lambda old, new: max(old, new, key=lambda v: v ^ 0x80000000),
    "min.u32": min,
    "exch.b32": lambda old, new: new,
    "xor.b32": lambda old, new: old ^ new,
}


@few
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**32 - 1)), min_size=64, max_size=64),
    name=st.sampled_from([*ATOMICS]),
    space=st.sampled_from(["global", "shared"]),
)
def test_atomics_go_in_thread_order(rows: list[tuple[int, int]], name: str, space: str) -> None:
    places, values = (np.array(column, np.uint32) for column in zip(*rows, strict=True))
    memory, old = np.zeros(6, np.uint32), np.zeros(64, np.uint32)
    buffers = {"places": places, "values": values, "memory": memory, "old": old}
    base = "cvt.u64.u32 %rd4, %r0; shl.b64 %rd4, %rd4, 2; add.s64 %rd0, %rd0, %rd4; add.s64 %rd1, %rd1, %rd4;"
    load = "add.s64 %rd3, %rd3, %rd4; ld.global.u32 %r1, [%rd0]; ld.global.u32 %r2, [%rd1]; mul.wide.u32 %rd6, %r1, 4;"
    if space == "global":
        change = f"add.s64 %rd2, %rd2, %rd6; atom.global.{name} %r3, [%rd2], %r2;"
    else:
        clear = "".join(f"st.shared.u32 [shared+{4 * i}], 0;" for i in range(6))
        copy = "".join(f"ld.shared.u32 %r4, [shared+{4 * i}]; st.global.u32 [%rd2+{4 * i}], %r4;" for i in range(6))
        change = f"{clear} mov.u64 %rd7, shared; add.s64 %rd7, %rd7, %rd6; bar.sync 0;"
        change += f"atom.relaxed.cta.shared.{name} %r3, [%rd7], %r2; bar.sync 0; {copy}"
    run_text(f"{base}{load}{change} st.global.u32 [%rd3], %r3; ret;", buffers, threads=64, shared_bytes=24)
    expected, returned = [0] * 6, []
    for place, value in rows:
        returned.append(expected[place])
        expected[place] = ATOMICS[name](expected[place], value)
    assert memory.tolist() == expected
    assert old.tolist() == returned


def test_reductions_of_floats_and_compare_and_swap() -> None:
    x = np.zeros(2, np.float32)
    report = run_text(
        "cvt.rn.f32.u32 %r1, %r0; red.global.add.f32 [%rd0], %r1; add.u32 %r2, %r0, 1;"
        "atom.global.cas.b32 %r3, [%rd0+4], %r0, %r2; ret;",
        {"x": x},
    )
    assert x[0] == sum(range(32))
    assert x.view(np.uint32)[1] == 32  # each thread finds what the one before left
    assert report.written == {"x": 256}


def copies(body: str, shared_bytes: int = 512) -> np.ndarray:
    """x and x + 512 bytes copied by 32 threads; -> what `body` leaves in %r1 (of the first) and %r2 (of the second)."""
    x = np.arange(1, 257, dtype=np.uint32)
    y = np.zeros(64, np.uint32)
    run_text(
        f"mul.wide.u32 %rd2, %r0, 16; add.s64 %rd3, %rd0, %rd2; shl.b32 %r4, %r0, 4; mov.u32 %r5, shared;"
        f"add.u32 %r5, %r5, %r4; {body} mul.wide.u32 %rd4, %r0, 4; add.s64 %rd4, %rd1, %rd4;"
        f"st.global.u32 [%rd4], %r1; st.global.u32 [%rd4+128], %r2; ret;",
        {"x": x, "y": y},
        shared_bytes=2 * shared_bytes,
    )
    return y.reshape(2, 32)


COPY = "cp.async.cg.shared.global [%r5], [%rd3], 16;"
COPY_NEXT = "cp.async.cg.shared.global.L2::128B [%r5+512], [%rd3+512], 16;"
COMMIT = "cp.async.commit_group;"
READ = "ld.shared.u32 %r1, [%r5]; ld.shared.u32 %r2, [%r5+512];"
FIRST, SECOND, POISON = np.arange(1, 129, 4), np.arange(129, 257, 4), np.full(32, 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("waits", "first", "second"),
    [
        ("", POISON, POISON),
        ("cp.async.wait_group 2;", POISON, POISON),
        ("cp.async.wait_group 1;", FIRST, POISON),
        ("cp.async.wait_group 0;", FIRST, SECOND),
        ("cp.async.wait_all;", FIRST, SECOND),
    ],
)
def test_copies_arrive_when_waited_for(waits: str, first: np.ndarray, second: np.ndarray) -> None:
    result = copies(f"{COPY}{COMMIT}{COPY_NEXT}{COMMIT}{waits}{READ} cp.async.wait_group 0;")
    np.testing.assert_array_equal(result, [first, second])


def test_groups_belong_to_threads() -> None:
    """Odd threads end their groups once more than even ones, so their wait leaves less under way."""
    body = f"and.b32 %r6, %r0, 1; setp.eq.u32 %p1, %r6, 1; {COPY}{COMMIT}{COPY_NEXT}{COMMIT} @%p1 {COMMIT}"
    first, second = copies(f"{body} cp.async.wait_group 1; {READ} cp.async.wait_all;")
    np.testing.assert_array_equal(first, FIRST)
    np.testing.assert_array_equal(second, np.where(np.arange(32) % 2, SECOND, POISON))


def test_a_copy_of_nothing_fills_with_zeros_and_reads_nothing() -> None:
    """Threads from 16 on copy no bytes, from addresses that do not exist."""
    body = (
        "setp.lt.u32 %p1, %r0, 16; selp.b32 %r6, 16, 0, %p1; add.s64 %rd5, %rd3, 1000003;"
        "selp.b64 %rd5, %rd3, %rd5, %p1;"
        f"cp.async.cg.shared.global [%r5], [%rd5], 16, %r6; {COMMIT} cp.async.wait_group 0; ld.shared.u32 %r1, [%r5];"
    )
    first, _ = copies(body)
    np.testing.assert_array_equal(first, np.where(np.arange(32) < 16, FIRST, 0))


@pytest.mark.parametrize(
    "unfinished", [COPY, COPY + COMMIT, COPY + COMMIT + COPY_NEXT + COMMIT + "cp.async.wait_group 1;"]
)
def test_ending_with_copies_under_way(unfinished: str) -> None:
    with pytest.raises(PtxFault, match="ends with asynchronous copies under way"):
        copies(unfinished)


def test_wrong_use_is_told_at_once() -> None:
    x = np.zeros((4, 4), np.uint32)
    with pytest.raises(UsageError, match="'x' is not C-contiguous"):
        run_text("ret;", {"x": x[:, :2]})
    with pytest.raises(UsageError, match="multiple of 32"):
        run_text("ret;", {"x": x}, threads=48)
    with pytest.raises(PtxFault, match=r"has 32 bits and is used as \.b64"):
        compute("mov.b64 %d0, %a0;", [np.zeros(1, np.uint32)], ["u8"])
