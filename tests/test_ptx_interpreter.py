"""Control flow of interpreted PTX: threads that part and meet again, barriers, and how the text itself is read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.simt import interpreter
from plugins.simt.interpreter import PtxFault
from plugins.simt.ptx_parser import Address, Immediate, Name, Pair, Register, Vector, parse
from tests.ptx_programs import compute, kernel_text, run_text

# A statement: ("set", n) x = 3 x + n; ("if", n, then, else) on a bit of x; ("loop", n, body) x % (n + 1) times.
Statement = tuple
statements = st.recursive(
    st.tuples(st.just("set"), st.integers(0, 9)),
    lambda inner: (
        st.tuples(st.just("if"), st.integers(0, 7), st.lists(inner, max_size=3), st.lists(inner, max_size=3))
        | st.tuples(st.just("loop"), st.integers(1, 4), st.lists(inner, max_size=2))
    ),
    max_leaves=12,
)


def meaning(program: list[Statement], x: int) -> int:
    """What one thread computes."""
    for kind, n, *parts in program:
        if kind == "set":
            x = (3 * x + n) % 2**32
        elif kind == "if":
            x = meaning(parts[0] if x >> n & 1 else parts[1], x)
        else:
            for _ in range(x % (n + 1)):
                x = meaning(parts[0], x)
    return x


def compiled(program: list[Statement], numbers: Iterator[int], moved: list[str]) -> str:
    """PTX on %r1; the bodies of conditions go to `moved`, so that threads come back to lower addresses."""
    text = ""
    for kind, n, *parts in program:
        i = next(numbers)
        if kind == "set":
            text += f"mad.lo.u32 %r1, %r1, 3, {n};\n"
        elif kind == "if":
            otherwise = compiled(parts[1], numbers, moved)
            moved.append(f"THEN{i}: {compiled(parts[0], numbers, moved)} bra.uni END{i};\n")
            test = f"bfe.u32 %r2, %r1, {n}, 1; setp.eq.u32 %p1, %r2, 1;"
            text += f"{test} @%p1 bra THEN{i}; {otherwise}\nEND{i}:\n"
        else:
            counter = f".reg .b32 %n{i}; .reg .pred %q{i}; rem.u32 %n{i}, %r1, {n + 1};"
            step = f"setp.eq.u32 %q{i}, %n{i}, 0; @%q{i} bra DONE{i}; sub.u32 %n{i}, %n{i}, 1;"
            text += f"{counter}\nLOOP{i}: {step} {compiled(parts[0], numbers, moved)} bra LOOP{i};\nDONE{i}:\n"
    return text


@settings(max_examples=60, deadline=None)
@given(program=st.lists(statements, max_size=5))
def test_every_thread_computes_what_it_would_alone(program: list[Statement]) -> None:
    """And all meet again at the vote and the barrier behind it, wherever they have been."""
    moved: list[str] = []
    main = compiled(program, count(), moved)
    x = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    y, votes = np.zeros_like(x), np.zeros_like(x)
    run_text(
        f"mul.wide.u32 %rd4, %r0, 4; add.s64 %rd0, %rd0, %rd4; add.s64 %rd1, %rd1, %rd4; add.s64 %rd2, %rd2, %rd4;"
        f"ld.global.u32 %r1, [%rd0];\n{main}\nand.b32 %r3, %r1, 1; setp.ne.u32 %p2, %r3, 0;"
        "vote.sync.ballot.b32 %r4, %p2, -1; bar.sync 0; st.global.u32 [%rd1], %r1; st.global.u32 [%rd2], %r4; ret;\n"
        + "".join(moved),
        {"x": x, "y": y, "votes": votes},
        threads=64,
    )
    assert y.tolist() == [meaning(program, value) for value in x.tolist()]
    packed = np.packbits((y & 1).astype(bool).reshape(2, 32), axis=1, bitorder="little").view(np.uint32)
    np.testing.assert_array_equal(votes.reshape(2, 32), np.broadcast_to(packed, (2, 32)))


def test_blocks_of_a_batch_pass_barriers_different_numbers_of_times() -> None:
    """Block b sums its threads' numbers in shared memory b times."""
    x = np.zeros(70, np.uint32)
    run_text(
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, 0; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [shared], 0; bar.sync 0;\n"
        "LOOP: setp.eq.u32 %p2, %r2, %r1; @%p2 bra DONE; atom.shared.add.u32 %r3, [shared], %r0; bar.sync 0;"
        "add.u32 %r2, %r2, 1; bra LOOP;\n"
        "DONE: ld.shared.u32 %r4, [shared]; mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd0, %rd1;"
        "@%p1 st.global.u32 [%rd1], %r4; ret;",
        {"x": x},
        threads=64,
        grid=(70, 1, 1),
        shared_bytes=4,
    )
    np.testing.assert_array_equal(x, np.arange(70) * (64 * 63 // 2))


def test_coordinates() -> None:
    """Every thread of a 3-d grid writes its own place, from the special registers."""
    x = np.zeros((2, 3, 5, 64), np.uint32)
    run_text(
        "mov.u32 %r1, %ctaid.z; mov.u32 %r2, %nctaid.y; mov.u32 %r3, %ctaid.y; mad.lo.u32 %r1, %r1, %r2, %r3;"
        "mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.x; mad.lo.u32 %r1, %r1, %r2, %r3; mov.u32 %r2, %ntid.x;"
        "mad.lo.u32 %r1, %r1, %r2, %r0; mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd0, %rd1;"
        "mov.u32 %r4, %laneid; mov.u32 %r5, %warpid; mad.lo.u32 %r4, %r5, 32, %r4; mad.lo.u32 %r1, %r1, 100, %r4;"
        "st.global.u32 [%rd1], %r1; ret;",
        {"x": x},
        threads=64,
        grid=(5, 3, 2),
    )
    index = np.arange(x.size, dtype=np.uint32)
    np.testing.assert_array_equal(x.reshape(-1), index * 100 + index % 64)


LDMATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [shared]"
HALF = "setp.lt.u32 %p1, %r0, 16;"
FAULTS = {
    "barrier in one branch": f"{HALF} @%p1 bra SKIP; bar.sync 0; SKIP: ret;",
    "barrier after early return": f"{HALF} @%p1 ret; bar.sync 0; ret;",
    "different barriers": f"{HALF} @%p1 bra ONE; bar.sync 0; ret; ONE: bar.sync 0; ret;",
    "barrier with a guard": f"{HALF} @%p1 bar.sync 0; ret;",
    "barrier of one warp": "setp.lt.u32 %p1, %r0, 32; @%p1 bra SKIP; bar.sync 0; SKIP: ret;",
    "shuffle in one branch": f"{HALF} @!%p1 bra SKIP; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; SKIP: ret;",
    "shuffle with a guard": f"{HALF} @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; ret;",
    "vote after early return": f"{HALF} @!%p1 exit; vote.sync.any.pred %p2, %p1, -1; ret;",
    "matrices in one branch": f"{HALF} @%p1 bra SKIP; {LDMATRIX}; SKIP: ret;",
    "warp barrier in one branch": f"{HALF} @%p1 bra SKIP; bar.warp.sync -1; SKIP: ret;",
}


@pytest.mark.parametrize("name", FAULTS)
def test_collectives_without_all_their_threads(name: str) -> None:
    with pytest.raises(PtxFault, match=r"reached by \d+ of \d+ threads|only some of the \d+ threads"):
        run_text(FAULTS[name], {"x": np.zeros(1)}, threads=64, grid=(2, 1, 1), shared_bytes=128)


def test_warps_may_part_at_collectives() -> None:
    """Of whole warps, some shuffle (also under a guard), others return early; their block has no barrier."""
    x = np.zeros(64, np.uint32)
    run_text(
        "mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd0, %rd1; setp.lt.u32 %p1, %r0, 32; mov.u32 %r1, 7;"
        "@%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; st.global.u32 [%rd1], %r1; @%p1 ret;"
        "shfl.sync.bfly.b32 %r1, %r0, 2, 31, -1; st.global.u32 [%rd1], %r1; ret;",
        {"x": x},
        threads=64,
    )
    thread = np.arange(64)
    np.testing.assert_array_equal(x, np.where(thread < 32, thread ^ 1, thread ^ 2))


def test_an_endless_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "MOST_STEPS", 1000)
    with pytest.raises(PtxFault, match="no end after 1000 basic blocks"):
        run_text("LOOP: bra LOOP;", {"x": np.zeros(1)})


def test_names_in_braces_are_local() -> None:
    """As in the assembly of cuda_fp16.h: two scopes use one name, a third shadows the kernel's."""
    (result,) = compute(
        ".reg .b16 low;\n mov.b16 low, 7;\n"
        "{.reg .b16 low,high;\n  mov.b32 {low,high}, %a0;\n  mov.b32 %r1, {high,low};}\n"
        "{ .reg .b32 low; add.u32 low, %r1, 1; { .reg .b64 low; cvt.u64.u32 low, %r1; } mov.b32 %r2, low; }\n"
        "// comment; with { a brace\n /* and another { */ cvt.u32.u16 %r3, low; add.u32 %d0, %r2, %r3;",
        [np.array([0x00020001], np.uint32)],
        ["u4"],
    )
    assert result[0] == 0x00010002 + 1 + 7


def test_instructions_and_operands() -> None:
    text = kernel_text(
        '\t.loc\t1 24 0\nSTART:\n\t@!%p1 st.global.v2.f32 \t[%rd1+-8], {%r1, 0f3F800000};\n\t.pragma "nounroll";\n'
        "\t.loc\t1 6 3, function_name $L__info_string0, inlined_at 1 24 1\n"
        "shfl.sync.up.b32 %r2|%p2, %r1, -1, 0x1fU, %r3; ld.shared.u32 %r1, [shared+4]; $L__END: ret;",
        2,
    )
    entry = parse(text + '.file\t1 "/some/where/attend.cu"\n', "k")
    store, shuffle, load, _ = entry.instructions[-4:]
    assert (entry.parameters, entry.parameter_bytes, entry.shared) == ({"k_param_0": 0}, 16, {"shared"})
    r1, p1 = Register("%r1", 32), Register("%p1", 1)
    assert store.operands == (Address(Register("%rd1", 64), -8), Vector((r1, Immediate(0x3F800000))))
    assert store.where == "`@!%p1 st.global.v2.f32 [%rd1+-8], {%r1, 0f3F800000}` (attend.cu:24)"
    assert store.predicate is not None
    assert store.predicate.register == p1
    assert shuffle.source == "attend.cu:6"
    expected = (Pair(Register("%r2", 32), Register("%p2", 1)), r1, Immediate(-1), Immediate(31), Register("%r3", 32))
    assert shuffle.operands == expected
    assert load.operands[1] == Address(Name("shared"), 4)
    assert {name: entry.instructions[i].opcode for name, i in entry.labels.items()} == {
        "START": "st.global.v2.f32",
        "$L__END": "ret",
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (".local .align 16 .b8 __local_depot0[16]; ret;", "spilled or indexed local memory"),
        (".shared .align 4 .b8 table[16]; ret;", "static shared memory"),
        ("bra NOWHERE;", "unknown label"),
        ("bar.sync 1; ret;", "a barrier of only some threads"),
        ("barrier.red.popc.u32 %r1, 0, %p1;", "unknown opcode"),
        ("call.uni f, (%r1);", "call.uni f"),
        ("mov.u32 %r1, %clock;", "unknown name %clock"),
        ("add.u32 %r1, %p1, 1;", "%p1 is used as .u32"),
        ("add.u32 %p1, %r1, 1;", "cannot hold a .u32"),
        ("= 3;", "no PTX statement"),
    ],
)
def test_text_that_is_refused(body: str, message: str) -> None:
    with pytest.raises(PtxFault, match=message):
        run_text(body, {"x": np.zeros(1)})


def test_a_missing_kernel_is_named() -> None:
    with pytest.raises(PtxFault, match="has no kernel 'other'"):
        parse(kernel_text("ret;", 1), "other")
