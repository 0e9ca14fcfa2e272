"""The PTX executor, instruction by instruction, against Python's numbers; and what it refuses to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.tools import ptx
from gpu.tools.memory_map import OutOfBoundsError, guarded

WARP = 32
HEADER = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry sample(
    .param .u64 .ptr .global .align 1 sample_param_0,
    .param .u64 .ptr .global .align 1 sample_param_1
)
.reqntid %d
{
.reg .pred %%p<8>;
.reg .b16 %%h<8>;
.reg .b32 %%r<16>;
.reg .b64 %%d<16>;
ld.param.b64 %%d1, [sample_param_0];
ld.param.b64 %%d2, [sample_param_1];
mov.u32 %%r0, %%tid.x;
mul.wide.u32 %%d3, %%r0, 8;
add.s64 %%d1, %%d1, %%d3;
add.s64 %%d2, %%d2, %%d3;
"""


def run(
    body: str, data: Tensor, *, threads: int = WARP, schedule: Any = "cta", shared: int = 0, seed: int = 0
) -> Tensor:
    """Executes a body that finds 8 bytes of its thread's input at %d1 and of its output at %d2."""
    out = guarded(torch.zeros(threads, dtype=torch.int64))
    kernel = ptx.parse(HEADER % threads + body + "\nret;\n\n}\n")
    ptx.launch(kernel, (1,), [guarded(data), out], shared=shared, schedule=schedule, seed=seed)
    return out


def of_registers(opcode: str, values: Sequence[Sequence[int]], widths: str) -> list[int]:
    """Results of one instruction for several sets of operands, all as bits.

    Args:
        opcode: of an instruction with one result.
        values: operands of each thread; at most 32 sets.
        widths: sizes of the result and the operands: h 16 bits, r 32, d 64.
    """
    bits = {"h": 16, "r": 32, "d": 64}
    results = []
    loads = [f"ld.global.b{bits[w]} %{w}{i + 4}, [%d1+{i * 8}];" for i, w in enumerate(widths[1:])]
    operands = ", ".join(f"%{w}{i + 4}" for i, w in enumerate(widths[1:]))
    store = f"st.global.b{bits[widths[0]]} [%d2], %{widths[0]}7;"
    body = "\n".join([*loads, f"{opcode} %{widths[0]}7, {operands};", store])
    for each in values:
        data = torch.zeros(WARP + 4, dtype=torch.int64)
        for i, value in enumerate(each):
            data[i] = value - (1 << 64) if value >= 1 << 63 else value
        results.append(int(run(body, data)[0]) % (1 << bits[widths[0]]))
    return results


def float_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float64).view(torch.int64)) % (1 << 64)


def single_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) % (1 << 32)


FLOAT64: list[tuple[str, Callable[..., float], list[tuple[float, ...]]]] = [
    ("add.f64", lambda a, b: a + b, [(0.1, 0.2), (1e308, 1e308), (-0.0, -0.0)]),
    ("sub.rn.f64", lambda a, b: a - b, [(0.1, 0.3), (math.inf, math.inf)]),
    ("mul.f64", lambda a, b: a * b, [(0.1, 0.3), (1e-200, 1e-200)]),
    ("div.rn.f64", lambda a, b: a / b, [(1.0, 3.0), (-1.0, 7.0)]),
    ("sqrt.rn.f64", math.sqrt, [(2.0,), (0.1,)]),
    ("rcp.rn.f64", lambda a: 1 / a, [(3.0,), (7.0,)]),
    ("neg.f64", lambda a: -a, [(0.0,), (1.5,)]),
    ("abs.f64", abs, [(-0.0,), (-1.5,)]),
    ("fma.rn.f64", lambda *_: 2.0**-60, [(1 + 2.0**-30, 1 + 2.0**-30, -(1 + 2.0**-29))]),
    ("min.f64", lambda a, b: -1.0, [(-1.0, math.nan), (math.nan, -1.0), (-1.0, 2.0)]),
    ("min.f64", lambda a, b: -0.0, [(0.0, -0.0), (-0.0, 0.0)]),
    ("max.f64", lambda a, b: 0.0, [(0.0, -0.0), (-0.0, 0.0), (0.0, math.nan)]),
    ("max.NaN.f64", lambda a, b: math.nan, [(1.0, math.nan), (math.nan, 1.0)]),
    ("cvt.rni.f64.f64", lambda a: math.copysign(round(a), a), [(2.5,), (3.5,), (-0.4,)]),
    ("cvt.rmi.f64.f64", math.floor, [(-2.5,), (2.5,)]),
    ("cvt.rpi.f64.f64", math.ceil, [(-2.5,), (2.5,)]),
    ("cvt.rzi.f64.f64", math.trunc, [(-2.5,), (2.5,)]),
    ("copysign.f64", lambda a, b: math.copysign(b, a), [(-1.0, 3.0), (1.0, -3.0)]),
]


@pytest.mark.parametrize(("opcode", "expected", "cases"), FLOAT64, ids=[case[0] for case in FLOAT64])
def test_float64(opcode: str, expected: Callable[..., float], cases: list[tuple[float, ...]]) -> None:
    widths = "d" * (len(cases[0]) + 1)
    actual = of_registers(opcode, [[float_bits(value) for value in case] for case in cases], widths)
    for case, bits in zip(cases, actual, strict=True):
        should = float(expected(*case))
        assert bits == float_bits(should) or (math.isnan(should) and bits & (0x7FF << 52) == 0x7FF << 52), case


CONVERSIONS = [
    ("cvt.rn.f32.f64", float_bits(0.1), single_bits(0.1), "rd"),
    ("cvt.rz.f32.f64", float_bits(0.1), single_bits(0.1) - 1, "rd"),
    ("cvt.rp.f32.f64", float_bits(0.1), single_bits(0.1), "rd"),
    ("cvt.rm.f32.f64", float_bits(0.1), single_bits(0.1) - 1, "rd"),
    ("cvt.f64.f32", single_bits(0.1), float_bits(float(torch.tensor(0.1))), "dr"),
    ("cvt.rn.f16.f64", float_bits(65504.0), 0x7BFF, "hd"),
    ("cvt.rn.f16.f32", single_bits(65520.0), 0x7C00, "hr"),
    ("cvt.f32.f16", 0x0001, single_bits(2.0**-24), "rh"),
    ("cvt.rn.bf16.f32", single_bits(1 + 2.0**-8), 0x3F80, "hr"),
    ("cvt.rn.bf16.f32", single_bits(1 + 3 * 2.0**-8), 0x3F82, "hr"),
    ("cvt.f32.bf16", 0x0001, 0x0001_0000, "rh"),
    ("cvt.rzi.s32.f64", float_bits(-2.9), 2**32 - 2, "rd"),
    ("cvt.rzi.s32.f64", float_bits(1e20), 2**31 - 1, "rd"),
    ("cvt.rzi.s32.f32", single_bits(math.nan), 0, "rr"),
    ("cvt.rzi.s64.f64", float_bits(math.nan), 2**63, "dd"),
    ("cvt.rn.f64.s64", 2**64 - 3, float_bits(-3.0), "dd"),
    ("cvt.rn.f64.u64", 2**64 - 1, float_bits(2.0**64), "dd"),
    ("cvt.rn.f32.s32", 2**24 + 1, single_bits(2.0**24), "rr"),
    ("cvt.s64.s32", 2**32 - 5, 2**64 - 5, "dr"),
    ("cvt.u64.u32", 2**32 - 5, 2**32 - 5, "dr"),
    ("cvt.s32.s8", 0x80, 2**32 - 128, "rh"),
    ("cvt.sat.u8.s32", 300, 255, "hr"),
    ("cvt.sat.u8.s32", 2**32 - 5, 0, "hr"),
    ("cvt.u32.u64", 2**40 + 7, 7, "rd"),
]


@pytest.mark.parametrize(("opcode", "operand", "expected", "widths"), CONVERSIONS)
def test_conversions(opcode: str, operand: int, expected: int, widths: str) -> None:
    assert of_registers(opcode, [[operand]], widths) == [expected]


ALL = 2**64 - 1
INTEGERS = [
    ("add.s64", (ALL, 5), 4, "ddd"),
    ("mul.lo.s64", (2**40 + 1, 2**40 + 1), 2**41 + 1, "ddd"),
    ("mul.hi.u64", (ALL, ALL), ALL - 1, "ddd"),
    ("mul.hi.s64", (ALL, 3), ALL, "ddd"),
    ("mul.hi.s32", (2**31, 2**31), 2**30, "rrr"),
    ("mul.wide.s32", (2**32 - 1, 7), 2**64 - 7, "drr"),
    ("mul.wide.u32", (2**32 - 1, 7), (2**32 - 1) * 7, "drr"),
    ("mad.wide.s32", (2**32 - 2, 3, 10), 4, "drrd"),
    ("mad.lo.s32", (5, 7, 2**32 - 36), 2**32 - 1, "rrrr"),
    ("div.s32", (2**32 - 7, 2), 2**32 - 3, "rrr"),
    ("rem.s32", (2**32 - 7, 2), 2**32 - 1, "rrr"),
    ("div.u64", (ALL, 10), ALL // 10, "ddd"),
    ("min.s32", (2**32 - 1, 1), 2**32 - 1, "rrr"),
    ("min.u32", (2**32 - 1, 1), 1, "rrr"),
    ("shl.b32", (1, 33), 0, "rrr"),
    ("shl.b64", (1, 63), 2**63, "ddr"),
    ("shr.s32", (2**31, 40), 2**32 - 1, "rrr"),
    ("shr.u32", (2**31, 31), 1, "rrr"),
    ("shf.l.wrap.b32", (0x8000_0000, 1, 1), 3, "rrrr"),
    ("shf.r.clamp.b32", (0, 5, 32), 5, "rrrr"),
    ("bfe.u32", (0xABCD, 4, 8), 0xBC, "rrrr"),
    ("bfe.s32", (0xABCD, 8, 4), 2**32 - 5, "rrrr"),
    ("bfi.b32", (0xF, 0, 4, 4), 0xF0, "rrrrr"),
    ("prmt.b32", (0x33221100, 0x77665544, 0x7410), 0x77441100, "rrrr"),
    ("prmt.b32", (0x80, 0, 0x8888), 2**32 - 1, "rrrr"),
    ("popc.b64", (ALL,), 64, "rd"),
    ("popc.b32", (0x101,), 2, "rr"),
    ("clz.b32", (1,), 31, "rr"),
    ("clz.b64", (0,), 64, "rd"),
    ("brev.b32", (1,), 2**31, "rr"),
    ("bfind.u32", (0x100,), 8, "rr"),
    ("bfind.s32", (2**32 - 1,), 2**32 - 1, "rr"),
    ("not.b32", (0,), 2**32 - 1, "rr"),
    ("abs.s32", (2**32 - 5,), 5, "rr"),
    ("neg.s64", (5,), 2**64 - 5, "dd"),
    ("add.rn.f16x2", (0x3C00_4000, 0x3C00_3C00), 0x4000_4200, "rrr"),
]


@pytest.mark.parametrize(("opcode", "operands", "expected", "widths"), INTEGERS)
def test_integers(opcode: str, operands: tuple[int, ...], expected: int, widths: str) -> None:
    assert of_registers(opcode, [operands], widths) == [expected]


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xFE, 0x1B])
def test_lop3_is_its_truth_table(table: int) -> None:
    body = f"mov.b32 %r4, 240; mov.b32 %r5, 204; mov.b32 %r6, 170; lop3.b32 %r7, %r4, %r5, %r6, {table}; "
    result = run(body + "st.global.b32 [%d2], %r7;", torch.zeros(WARP, dtype=torch.int64))
    assert int(result[0]) & 255 == table


@pytest.mark.parametrize(
    ("comparison", "a", "b", "expected"),
    [
        ("lt", 1.0, 2.0, 1),
        ("lt", 1.0, math.nan, 0),
        ("ltu", 1.0, math.nan, 1),
        ("ltu", 3.0, 2.0, 0),
        ("ne", 1.0, math.nan, 0),
        ("neu", 1.0, math.nan, 1),
        ("neu", 1.0, 1.0, 0),
        ("equ", 1.0, 1.0, 1),
        ("gtu", 1.0, 2.0, 0),
        ("num", 1.0, 2.0, 1),
        ("nan", 1.0, math.nan, 1),
    ],
)
def test_comparisons(comparison: str, a: float, b: float, expected: int) -> None:
    body = f"setp.{comparison}.f64 %p1, %d4, %d5; selp.b64 %d7, 1, 0, %p1;"
    load = "ld.global.v2.b64 {%d4, %d5}, [%d1]; "
    data = torch.tensor([a, b] + [0.0] * WARP * 2, dtype=torch.float64).view(torch.int64)
    first_only = "setp.ne.u32 %p2, %r0, 0; @%p2 bra $END; " + load + body + " st.global.b64 [%d2], %d7; $END:"
    assert int(run(first_only, data)[0]) == expected


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("bfly.b32 %r7, %r0, 5, 31, -1", [i ^ 5 for i in range(32)]),
        ("up.b32 %r7, %r0, 4, 0, -1", [max(i - 4, i if i < 4 else 0) for i in range(32)]),
        ("down.b32 %r7, %r0, 4, 31, -1", [i + 4 if i < 28 else i for i in range(32)]),
        ("idx.b32 %r7, %r0, 9, 31, -1", [9] * 32),
        ("idx.b32 %r7, %r0, 1, 6175, -1", [i // 8 * 8 + 1 for i in range(32)]),  # segments of 8: 0x181F
    ],
)
def test_shuffles(form: str, expected: list[int]) -> None:
    body = f"shfl.sync.{form}; cvt.u64.u32 %d7, %r7; st.global.b64 [%d2], %d7;"
    assert run(body, torch.zeros(WARP, dtype=torch.int64)).tolist() == expected


def test_votes_and_reductions() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 3;
    vote.sync.ballot.b32 %r5, %p1, -1;
    redux.sync.add.s32 %r6, %r0, -1;
    mov.b64 %d7, {%r5, %r6};
    st.global.b64 [%d2], %d7;
    """
    assert run(body, torch.zeros(WARP, dtype=torch.int64)).tolist() == [7 + (496 << 32)] * WARP


def test_threads_diverge_and_loop() -> None:
    body = """
    mov.u32 %r4, 0;
    mov.u32 %r5, 0;
    $LOOP:
    setp.ge.u32 %p1, %r4, %r0;
    @%p1 bra $DONE;
    add.s32 %r4, %r4, 1;
    add.s32 %r5, %r5, %r4;
    bra.uni $LOOP;
    $DONE:
    cvt.u64.u32 %d7, %r5;
    st.global.b64 [%d2], %d7;
    """
    data = torch.zeros(64, dtype=torch.int64)
    assert run(body, data, threads=64).tolist() == [i * (i + 1) // 2 for i in range(64)]


EXCHANGE = """
mov.b64 %d5, global_smem;
add.s64 %d5, %d5, %d3;
cvt.u64.u32 %d6, %r0;
st.shared.b64 [%d5], %d6;
{barrier}
xor.b32 %r4, %r0, 32;
mul.wide.u32 %d7, %r4, 8;
mov.b64 %d5, global_smem;
add.s64 %d5, %d5, %d7;
ld.shared.b64 %d8, [%d5];
st.global.b64 [%d2], %d8;
"""


@pytest.mark.parametrize("schedule", ["cta", "warp"])
def test_a_barrier_orders_warps_and_a_missing_one_is_a_race(schedule: str) -> None:
    data = torch.zeros(64, dtype=torch.int64)
    right = EXCHANGE.replace("{barrier}", "bar.sync 0;")
    result = run(right, data, threads=64, schedule=schedule, shared=512)
    assert result.tolist() == [i ^ 32 for i in range(64)]
    for seed in range(3):
        with pytest.raises(ptx.PTXError, match="race in shared memory, another warp"):
            run(EXCHANGE.replace("{barrier}", ""), data, threads=64, schedule=schedule, shared=512, seed=seed)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.b32 %r4, %r5;", r"unknown: frobnicate\.b32 %r4, %r5"),
        ("ld.const.b32 %r4, [%d1];", "unknown space"),
        ("mov.b64 %d5, global_smem; ld.shared.b64 %d4, [%d5+512];", "shared memory out of bounds"),
        ("mov.b64 %d5, global_smem; ld.shared.b64 %d4, [%d5+4];", "shared memory misaligned"),
        ("mov.b64 %d5, global_smem; st.shared.b32 [%d5], %r0;", "two threads store different values"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra $L; bar.sync 0; $L:", "not reached by all"),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 bra $L; shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1; $L:", "is not here"),
        ("$L: bra $L;", "no end in sight"),
        ("add.rz.f64 %d4, %d5, %d6;", "rounding"),
        ("mov.b32 %nothing, %r4;", "not declared"),
        ("bar.sync 1;", "unknown"),
    ],
)
def test_what_a_gpu_would_not_run_raises(body: str, message: str) -> None:
    out = guarded(torch.zeros(64, dtype=torch.int64))
    kernel = ptx.parse(HEADER % 64 + body + "\nret;\n\n}\n")
    with pytest.raises(ptx.PTXError, match=message):
        ptx.launch(kernel, (1,), [out, out], shared=512, limit=1000)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b64 [%d2+8], %d3;", "store.*: out of bounds, 1 of 32 accesses of 8 bytes"),
        ("ld.global.b64 %d4, [%d1+-8];", "load.*: out of bounds, 1 of 32"),
        ("ld.global.b64 %d4, [%d1+4];", "load.*(out of bounds|misaligned)"),
        ("ld.global.v2.b64 {%d4, %d5}, [%d1];", "load.*: out of bounds, 1 of 32 accesses of 16"),
        ("mov.b64 %d5, 0; ld.global.b32 %r4, [%d5];", "load.*: out of bounds, 32 of 32"),
    ],
)
def test_accesses_are_checked(body: str, message: str) -> None:
    with pytest.raises(OutOfBoundsError, match=message):
        run(body, torch.zeros(WARP, dtype=torch.int64))


def test_a_vector_has_to_be_aligned() -> None:
    body = "setp.gt.u32 %p1, %r0, 3; @%p1 bra $L; ld.global.v2.b64 {%d4, %d5}, [%d1]; $L:"
    with pytest.raises(OutOfBoundsError, match="misaligned, 2 of 4 accesses of 16 bytes"):
        run(body, torch.zeros(WARP, dtype=torch.int64))


def test_atomic_operations() -> None:
    body = "ld.param.b64 %d4, [sample_param_1]; atom.global.gpu.relaxed.add.u64 %d5, [%d4], 2;"
    assert int(run(body, torch.zeros(WARP, dtype=torch.int64))[0]) == 64
    once = "ld.param.b64 %d4, [sample_param_1]; mov.b64 %d5, 0; mov.b64 %d6, 7; "
    exchanged = run(once + "atom.global.cas.b64 %d7, [%d4], %d5, %d6;", torch.zeros(WARP, dtype=torch.int64))
    assert int(exchanged[0]) == 7
    largest = "ld.param.b64 %d4, [sample_param_1]; cvt.u64.u32 %d5, %r0; red.global.gpu.max.u64 [%d4], %d5;"
    assert int(run(largest, torch.zeros(WARP, dtype=torch.int64))[0]) == 31


def test_statistics() -> None:
    body = "ld.global.b64 %d4, [%d1]; ld.global.b32 %r4, [%d1]; st.global.b64 [%d2], %d4; bar.sync 0;"
    kernel = ptx.parse(HEADER % 64 + body + "\nret;\n\n}\n")
    x, out = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    done = ptx.launch(kernel, (3,), [x, out], shared=0)
    assert torch.equal(x, out)
    assert (done.loaded, done.loaded_once) == (3 * 64 * 12, 512)
    assert (done.stored, done.stored_once) == (3 * 64 * 8, 512)
    assert done.load_widths == {8: 192, 4: 192}
    assert done.instructions["bar.sync"] == 6, "counted by warps"
    assert done.count("ld.global") == 12
