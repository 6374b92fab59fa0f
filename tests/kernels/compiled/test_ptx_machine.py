"""The PTX emulator, on hand-written programs."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.cta import Cta, Launch
from ptx.fault import Fault
from ptx.global_memory import GlobalMemory
from ptx.program import parse
from ptx.translation import Translation

THREADS = 64
HEAD = f"""
.visible .entry k(.param .u64 .ptr .global k_param_0, .param .u64 k_param_1)
.reqntid {THREADS}
{{
.reg .pred %p<9>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
ld.param.b64 %rd0, [k_param_0];
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd1, %r0, 4;
add.s64 %rd2, %rd0, %rd1;
"""


def run(body: str, data: np.ndarray, *, programs: int = 1, shared_bytes: int = 1024) -> np.ndarray:
    """Run a program on ``[threads]`` words of memory; %rd2 points at the thread's own."""
    memory = GlobalMemory()
    result = data.copy()
    base = memory.add(result.view(np.uint8))
    translation = Translation(parse(f"{HEAD}{body}\nret;\n}}"))
    launch = Launch((programs, 1, 1), (base, 0), memory, THREADS, shared_bytes)
    with np.errstate(all="ignore"):
        for number in range(programs):
            translation.run(Cta(launch, number, (number, 0, 0)))
    return result


WORDS = np.arange(THREADS, dtype=np.uint32) * np.uint32(2654435761)


def computed(body: str, data: np.ndarray = WORDS) -> np.ndarray:
    """The result in %r9 of a computation on the thread's word in %r1."""
    text = f"ld.global.b32 {{ %r1 }}, [ %rd2 + 0 ];\n{body}\nst.global.b32 [ %rd2 ], {{ %r9 }};"
    return run(text, data)


SIGNED = WORDS.view(np.int32)
FLOATS = np.linspace(-3, 3, THREADS, dtype=np.float32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %r9, %r1, -3;", WORDS - np.uint32(3)),
        ("mul.lo.s32 %r9, %r1, 7;", WORDS * np.uint32(7)),
        ("mul.hi.s32 %r9, %r1, -5;", ((SIGNED.astype(np.int64) * -5) >> 32).astype(np.int32)),
        ("mad.lo.s32 %r9, %r1, 3, %r0;", WORDS * np.uint32(3) + np.arange(THREADS)),
        ("div.s32 %r9, %r1, -7;", np.trunc(SIGNED / -7).astype(np.int32)),
        ("rem.s32 %r9, %r1, 100;", np.fmod(SIGNED, 100)),
        ("shl.b32 %r9, %r1, %r0;", [int(w) << i & 0xFFFFFFFF for i, w in enumerate(WORDS)]),
        ("shr.u32 %r9, %r1, %r0;", [int(w) >> i for i, w in enumerate(WORDS)]),
        ("shr.s32 %r9, %r1, %r0;", [int(w) >> i & 0xFFFFFFFF for i, w in enumerate(SIGNED)]),
        ("bfe.u32 %r9, %r1, 5, 6;", WORDS >> 5 & 63),
        ("bfe.s32 %r9, %r1, 5, 1;", -(SIGNED >> 5 & 1)),
        ("prmt.b32 %r9, %r1, %r0, 0x0123;", WORDS.byteswap()),
        ("prmt.b32 %r9, %r1, %r0, 0x4BB3;", [
            i << 24 | (0xFFFF00 if w >> 31 else 0) | w >> 24 for i, w in enumerate(WORDS.tolist())
        ]),
        ("lop3.b32 %r9, %r1, %r0, 0xFF, 0xEA;", WORDS & np.arange(THREADS) | 0xFF),
        ("min.s32 %r9, %r1, 0;", np.minimum(SIGNED, 0)),
        ("cvt.u16.u32 %rs1, %r1; cvt.u32.u16 %r9, %rs1;", WORDS & 0xFFFF),
        ("cvt.s64.s32 %rd5, %r1; shr.s64 %rd6, %rd5, 16; cvt.u32.u64 %r9, %rd6;", SIGNED >> 16),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};", WORDS >> 16 | WORDS << 16),
        ("setp.lt.s32 %p1, %r1, 0; selp.b32 %r9, 1, 2, %p1;", np.where(SIGNED < 0, 1, 2)),
        ("setp.gt.u32 %p1, %r1, 9; mov.b32 %r9, 5; @%p1 mov.b32 %r9, 6; @!%p1 add.s32 %r9, %r9, 1;",
         np.full(THREADS, 6)),
        ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", WORDS[np.arange(THREADS) ^ 5]),
        ("shfl.sync.idx.b32 %r9, %r1, 3, 31, -1;", WORDS[np.arange(THREADS) // 32 * 32 + 3]),
    ],
)  # fmt: skip
def test_integers(body, expected):
    wanted = np.asarray(expected, dtype=np.int64) & 0xFFFFFFFF
    assert np.array_equal(computed(body), wanted)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("fma.rn.f32 %r9, %r1, %r1, %r1;", FLOATS.astype(np.float64) ** 2 + FLOATS),
        ("ex2.approx.f32 %r9, %r1;", np.exp2(FLOATS)),
        ("max.f32 %r9, %r1, 0f3F800000;", np.maximum(FLOATS, 1)),
        ("cvt.rn.f32.s32 %r9, %r0;", np.arange(THREADS)),
        ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r9, %rs1;", FLOATS),
        ("cvt.rn.bf16x2.f32 %r2, %r1, 0f40000000; shr.u32 %r3, %r2, 16; cvt.u16.u32 %rs1, %r3;"
         " cvt.f32.bf16 %r9, %rs1;", FLOATS),
        ("cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r9, %rs1;", FLOATS.astype(np.float16)),
    ],
)  # fmt: skip
def test_floats(body, expected):
    """Results are within one rounding of bf16 or fp32."""
    found = computed(body, FLOATS.view(np.uint32)).view(np.float32)
    error = np.abs(found - np.asarray(expected, dtype=np.float64))
    assert (error <= np.abs(expected) * (2**-8 if "bf16" in body else 2**-22)).all()


def test_bf16_is_rounded_to_even():
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001], dtype=np.uint32)
    found = computed(
        "cvt.rn.bf16.f32 %rs1, %r1; cvt.u32.u16 %r9, %rs1;", np.resize(halfway, THREADS)
    )
    assert found[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7FFF]


def test_a_loop_and_shared_memory():
    """Every thread reads its neighbour's word in the other warp, sixteen times."""
    body = """
        mov.b32 %r5, global_smem; shl.b32 %r6, %r0, 2; add.s32 %r7, %r5, %r6;
        xor.b32 %r8, %r6, 128; add.s32 %r8, %r8, %r5; mov.b32 %r10, 0; mov.b32 %r9, 0;
        $L__again:
        st.shared.b32 [ %r7 + 0 ], %r1; bar.sync 0;
        ld.shared.b32 %r2, [ %r8 ]; add.s32 %r9, %r9, %r2; bar.sync 0;
        add.s32 %r10, %r10, 1; setp.lt.s32 %p1, %r10, 16; @%p1 bra $L__again;
    """
    assert np.array_equal(computed(body), WORDS[np.arange(THREADS) ^ 32] * np.uint32(16))


def test_a_matrix_product():
    """``mma`` on values loaded by ``ldmatrix``, compared with numpy."""
    draw = np.random.default_rng(0)
    a, b = (draw.integers(-4, 5, shape).astype(np.float16) for shape in ((16, 16), (8, 16)))
    data = np.concatenate([a.ravel(), b.ravel()]).view(np.uint32)
    data = np.resize(data, 4 * THREADS)
    body = """
        mov.b32 %r5, global_smem; shl.b32 %r6, %r0, 4; add.s32 %r7, %r5, %r6;
        mul.wide.u32 %rd3, %r0, 16; add.s64 %rd4, %rd0, %rd3;
        cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x10, 16;
        cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
        and.b32 %r8, %r0, 15; shl.b32 %r8, %r8, 5; and.b32 %r9, %r0, 16; add.s32 %r8, %r8, %r9;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r8];
        and.b32 %r8, %r0, 7; shl.b32 %r8, %r8, 5; and.b32 %r9, %r0, 8; shl.b32 %r9, %r9, 1;
        add.s32 %r8, %r8, %r9;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r14, %r15}, [%r8 + 512];
        mov.b32 %r16, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20, %r21, %r22, %r23},
            {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r16, %r16, %r16};
        st.global.v4.b32 [ %rd4 ], {%r20, %r21, %r22, %r23};
    """
    found = run(body, data).view(np.float32).reshape(THREADS, 4)
    lane = np.arange(32)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    for i in range(4):
        assert np.array_equal(found[:32, i], exact[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2])


STAGE = (
    "mov.b32 %r5, global_smem; shl.b32 %r6, %r0, 2; add.s32 %r7, %r5, %r6; xor.b32 %r8, %r6, 128;"
)
COPY = "cp.async.ca.shared.global [ %r7 + 0 ], [ %rd2 + 0 ], 0x4, 4; cp.async.commit_group;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{STAGE} st.shared.b32 [%r7], %r0; ld.shared.b32 %r9, [%r8];", "race: a warp reads"),
        (f"{STAGE} st.shared.b32 [%r7], %r0; bar.sync 0; ld.shared.b32 %r9, [%r8];"
         " st.shared.b32 [%r7], %r0;", "race: a warp writes"),
        ("mov.b32 %r5, 0; st.shared.b32 [%r5], %r0;", "two threads write"),
        ("mov.b32 %r5, 0; ld.shared.b32 %r9, [%r5];", "uninitialised"),
        (f"{STAGE} {COPY} bar.sync 0; ld.shared.b32 %r9, [%r7]; cp.async.wait_group 0;",
         "still writing what is read"),
        (f"{STAGE} {COPY} cp.async.wait_group 0; ld.shared.b32 %r9, [%r8];", "race: a warp reads"),
        (f"{STAGE} {COPY}", "still under way"),
        ("mov.b32 %r5, 1022; st.shared.b32 [%r5], 1;", "misaligned"),
        ("mov.b32 %r5, 1024; st.shared.b32 [%r5], 1;", "out of bounds"),
        ("ld.global.b32 %r9, [ %rd2 + 4 ];", "out of bounds"),
        ("ld.global.b32 %r9, [ %rd2 + -4 ];", "no tensor"),
        ("ld.global.b32 %r9, [ %rd2 + 2 ];", "misaligned"),
        ("add.s32 %r9, %r8, 1;", "read before it is written"),
        ("setp.lt.u32 %p1, %r0, 3; @%p1 bra $L__end; mov.b32 %r9, 1; $L__end:",
         "different branches"),
    ],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(Fault, match=message):
        run(body, WORDS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [ %rd2 ], %r0;", "write the same place"),
        ("mov.u32 %r1, %ctaid.x; setp.eq.s32 %p1, %r1, 0; @%p1 bra $L__first;"
         " ld.global.b32 %r9, [ %rd2 ]; ret; $L__first: st.global.b32 [ %rd2 ], %r0;",
         "reads what another"),
        ("mov.u32 %r1, %ctaid.x; setp.eq.s32 %p1, %r1, 1; @%p1 bra $L__second;"
         " ld.global.b32 %r9, [ %rd2 ]; ret; $L__second: st.global.b32 [ %rd2 ], %r0;",
         "writes what another"),
    ],
)  # fmt: skip
def test_programs_of_a_launch_do_not_share_what_is_written(body, message):
    run(body, WORDS)
    with pytest.raises(Fault, match=message):
        run(body, WORDS, programs=2)


# Each program writes a word; the last one to increment word 63 reads the first one's word.
ARRIVE = (
    "setp.eq.s32 %p1, %r0, 0; mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd5, %r1, 4;"
    " add.s64 %rd6, %rd0, %rd5; @%p1 st.global.b32 [ %rd6 ], {{ %r1 }}; {before}"
    " setp.eq.s32 %p2, %r0, 32; mov.u32 %r2, 1; mov.u32 %r3, 0;"
    " @%p2 atom.global.gpu.{semantics}.add.u32 %r3, [ %rd0 + 252 ], %r2;"
    " @%p2 st.shared.b32 [ global_smem ], {{ %r3 }}; bar.sync 0;"
    " ld.shared.b32 {{ %r4 }}, [ global_smem ]; setp.ne.s32 %p3, %r4, 1; @%p3 bra $L__end;"
    " ld.global.b32 %r9, [ %rd0 ]; ld.global.b32 %r9, [ %rd0 + 4 ];"
    " @%p1 st.global.b32 [ %rd0 + 252 ], {{ %r4 }}; $L__end:"
)


def test_the_last_to_arrive_may_read_what_all_have_written():
    body = ARRIVE.format(before="bar.sync 0;", semantics="acq_rel")
    found = run(body, np.zeros(THREADS, dtype=np.uint32), programs=2)
    assert found[[1, 63]].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("before", "semantics"), [("", "acq_rel"), ("bar.sync 0;", "relaxed"), ("", "relaxed")]
)
def test_without_barrier_or_release_it_may_not(before, semantics):
    body = ARRIVE.format(before=before, semantics=semantics)
    with pytest.raises(Fault, match="reads what another"):
        run(body, np.zeros(THREADS, dtype=np.uint32), programs=2)


def test_an_instruction_that_is_not_known_is_refused():
    with pytest.raises(NotImplementedError, match=r"brev"):
        run("brev.b32 %r9, %r0;", WORDS)
