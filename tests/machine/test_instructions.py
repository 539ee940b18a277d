"""Single instructions of fastattn.machine, held against arithmetic done otherwise."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_support import address_of, run_ptx, write_kernel

from fastattn.machine.arithmetic import fma
from fastattn.machine.parser import PtxError, parse

WORD = 2**32

words = st.integers(0, WORD - 1)
floats = st.floats(width=32, allow_subnormal=False)


def compute(instructions: str, *operands: int) -> int:
    """What %r9 is after instructions on 32-bit operands in %r2, %r3, ..."""
    inputs = torch.tensor([signed(x) for x in operands], dtype=torch.int32)
    output = torch.zeros(1, dtype=torch.int32)
    loads = [f"ld.global.b32 {{ %r{2 + n} }}, [ %rd0 + {4 * n} ];" for n in range(len(operands))]
    store = "setp.eq.s32 %p9, %r0, 0; @%p9 st.global.b32 [ %rd1 + 0 ], { %r9 };"
    assert run_ptx("\n".join([*loads, instructions, store]), inputs, output) == []
    return int(output[0]) % WORD


def signed(x: int) -> int:
    return x - WORD if x >= WORD // 2 else x


def bits(x: float) -> int:
    return struct.unpack("I", struct.pack("f", x))[0]


def number(x: int) -> float:
    return struct.unpack("f", struct.pack("I", x))[0]


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


@settings(max_examples=20, deadline=None)
@given(words, words, words)
def test_integers(a: int, b: int, c: int):
    s, t = signed(a), signed(b)
    expected = {
        "add.s32 %r9, %r2, %r3;": s + t,
        "sub.s32 %r9, %r2, %r3;": s - t,
        "mul.lo.s32 %r9, %r2, %r3;": s * t,
        "mul.hi.u32 %r9, %r2, %r3;": a * b >> 32,
        "mul.hi.s32 %r9, %r2, %r3;": s * t >> 32,
        "mad.lo.s32 %r9, %r2, %r3, %r4;": a * b + c,
        "mul.wide.s32 %rd9, %r2, %r3; mov.b64 {_, %r9}, %rd9;": s * t >> 32,
        "min.s32 %r9, %r2, %r3;": min(s, t),
        "max.u32 %r9, %r2, %r3;": max(a, b),
        "max.relu.s32 %r9, %r2, %r3;": max(s, t, 0),
        "max.s32 %r9, %r2, %r3, %r4;": max(s, t, signed(c)),
        "and.b32 %r9, %r2, %r3;": a & b,
        "xor.b32 %r9, %r2, 0x55;": a ^ 0x55,
        "not.b32 %r9, %r2;": ~a,
        "shl.b32 %r9, %r2, 5;": a << 5,
        "shr.s32 %r9, %r2, 5;": s >> 5,
        "shr.u32 %r9, %r2, 40;": 0,
        "shf.l.wrap.b32 %r9, %r2, %r3, 7;": (b << 32 | a) << 7 >> 32,
        "shf.r.wrap.b32 %r9, %r2, %r3, 7;": (b << 32 | a) >> 7,
        "bfe.u32 %r9, %r2, 3, 9;": a >> 3 & 511,
        "bfi.b32 %r9, %r2, %r3, 4, 8;": b & ~0xFF0 | (a & 255) << 4,
        "lop3.b32 %r9, %r2, %r3, %r4, 0xE8;": (a & b) | (a & c) | (b & c),
        "prmt.b32 %r9, %r2, %r3, 0x5410;": (b & 0xFFFF) << 16 | a & 0xFFFF,
        "popc.b32 %r9, %r2;": a.bit_count(),
        "clz.b32 %r9, %r2;": 32 - a.bit_length(),
        "selp.b32 %r9, 1, 2, %p1;": 1 if s < t else 2,
        "cvt.s64.s32 %rd9, %r2; shr.s64 %rd9, %rd9, 4; cvt.u32.u64 %r9, %rd9;": s >> 4,
        "cvt.u16.u32 %rs1, %r2; cvt.s16.s8 %rs2, %rs1; cvt.s32.s16 %r9, %rs2;": (
            (a & 255) - 256 * (a >> 7 & 1)
        ),
    }
    if b and (s, t) != (-(2**31), -1):
        expected |= {
            "div.s32 %r9, %r2, %r3;": truncated_quotient(s, t),
            "rem.s32 %r9, %r2, %r3;": s - t * truncated_quotient(s, t),
            "div.u32 %r9, %r2, %r3;": a // b,
            "rem.u32 %r9, %r2, %r3;": a % b,
        }
    # All at once: one launch stores a result for each.
    inputs = torch.tensor([signed(x) for x in (a, b, c)], dtype=torch.int32)
    output = torch.zeros(len(expected), dtype=torch.int32)
    body = [f"ld.global.b32 {{ %r{2 + n} }}, [ %rd0 + {4 * n} ];" for n in range(3)]
    body += ["setp.lt.s32 %p1, %r2, %r3;", "setp.eq.s32 %p9, %r0, 0;"]
    for n, text in enumerate(expected):
        body += [text, f"@%p9 st.global.b32 [ %rd1 + {4 * n} ], {{ %r9 }};"]
    assert run_ptx("\n".join(body), inputs, output) == []
    for (text, value), found in zip(expected.items(), output.tolist(), strict=True):
        assert found % WORD == value % WORD, text


@pytest.mark.parametrize("a", [1.5, -2.75, 1e-30, math.inf, math.nan, 0.0, -0.0])
@pytest.mark.parametrize("b", [3.0, -0.1, math.nan, 1e30, 0.0])
def test_floats(a: float, b: float):
    x, y = np.float32(a), np.float32(b)
    with np.errstate(all="ignore"):
        expected = {
            "add.f32": x + y,
            "sub.f32": x - y,
            "mul.f32": x * y,
            "div.full.f32": x / y,
            "div.approx.f32": x / y,
            "max.f32": np.fmax(x, y),
            "min.NaN.f32": np.minimum(x, y),
        }
    for name, value in expected.items():
        found = np.float32(number(compute(f"{name} %r9, %r2, %r3;", bits(a), bits(b))))
        assert found == value or (np.isnan(found) and np.isnan(value)), name
    for name, value in {
        "lt": a < b,
        "ne": a != b and a == a and b == b,
        "geu": not a < b,
        "num": a == a and b == b,
        "nan": a != a or b != b,
    }.items():
        text = f"setp.{name}.f32 %p1, %r2, %r3; selp.b32 %r9, 1, 0, %p1;"
        assert compute(text, bits(a), bits(b)) == value, name


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_divisors_whose_inverse_is_no_normal_number(ftz: str):
    large, larger = 2.0**126, 1.5 * 2.0**126
    for a, b, expected in (
        (large, large, 1.0),
        (large, larger, 0.0),
        (-large, larger, -0.0),
        (large, -larger, -0.0),
        (math.inf, larger, math.nan),
        (math.nan, larger, math.nan),
        (math.inf, math.inf, math.nan),
        (1.0, math.inf, 0.0),
    ):
        text = f"div.approx{ftz}.f32 %r9, %r2, %r3;"
        found = number(compute(text, bits(a), bits(b)))
        assert found == expected or (math.isnan(found) and math.isnan(expected)), (a, b)
        assert math.copysign(1, found) == math.copysign(1, expected) or math.isnan(expected), (a, b)


@given(floats, floats, floats)
def test_fused_operations_round_once(a: float, b: float, c: float):
    if not all(map(math.isfinite, (a, b, c))):
        return
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    arrays = (np.full((1, 1), x, np.float32) for x in (a, b, c))
    with np.errstate(all="ignore"):
        found = float(fma(*arrays)[0, 0])
    if math.isinf(found) or abs(exact) < 2.0**-125:
        return
    neighbours = [float(np.nextafter(np.float32(found), np.float32(s * np.inf))) for s in (-1, 1)]
    distance = abs(Fraction(found) - exact)
    assert all(distance <= abs(Fraction(n) - exact) for n in neighbours if math.isfinite(n))


def test_a_fused_operation_whose_sum_falls_on_a_middle():
    # Rounded to float64 first, the sum lies between two float32 numbers and would go to the even.
    a, c = np.float32(1 + 2.0**-12), np.float32(2.0**-60)
    product = Fraction(float(a)) * Fraction(float(a))
    found = fma(*(np.full((1, 1), x, np.float32) for x in (a, a, c)))[0, 0]
    assert (
        Fraction(float(np.float32(product))) < product + Fraction(float(c)) < Fraction(float(found))
    )


@pytest.mark.parametrize(
    ("text", "a", "expected"),
    [
        ("cvt.rn.bf16.f32 %rs1, %r2; cvt.u32.u16 %r9, %rs1;", bits(1 + 2.0**-8), 0x3F80),
        ("cvt.rn.bf16.f32 %rs1, %r2; cvt.u32.u16 %r9, %rs1;", bits(1 + 3 * 2.0**-8), 0x3F82),
        ("cvt.rn.bf16x2.f32 %r9, 0f40000000, %r2;", bits(1.0), 0x40003F80),
        ("cvt.rn.f16.f32 %rs1, %r2; cvt.u32.u16 %r9, %rs1;", bits(70000.0), 0x7C00),
        ("cvt.rna.tf32.f32 %r9, %r2;", bits(1 + 2.0**-11), bits(1 + 2.0**-10)),
        ("cvt.rzi.s32.f32 %r9, %r2;", bits(-2.7), WORD - 2),
        ("cvt.rni.s32.f32 %r9, %r2;", bits(2.5), 2),
        ("cvt.rzi.s32.f32 %r9, %r2;", bits(math.nan), 0),
        ("cvt.rzi.u32.f32 %r9, %r2;", bits(1e20), WORD - 1),
        ("cvt.rn.f32.s32 %r9, %r2;", 2**24 + 3, bits(2.0**24 + 4)),
        ("ex2.approx.ftz.f32 %r9, %r2;", bits(3.0), bits(8.0)),
        ("ex2.approx.ftz.f32 %r9, %r2;", bits(-140.0), 0),
        ("rsqrt.approx.ftz.f32 %r9, %r2;", bits(4.0), bits(0.5)),
        ("abs.f32 %r9, %r2;", bits(-4.0), bits(4.0)),
        ("add.ftz.f32 %r9, %r2, %r2;", bits(1e-40), 0),
    ],
)
def test_conversions_and_functions(text: str, a: int, expected: int):
    assert compute(text, a) == expected


def test_pairs_of_halves():
    text = "fma.rn.bf16x2 %r9, %r2, %r3, %r4;"
    assert compute(text, 0x40004040, 0x40403F80, 0x3F803F80) == 0x40E04080
    text = "setp.ge.f16x2 %p1|%p2, %r2, %r3; selp.b32 %r5, 1, 0, %p1; selp.b32 %r9, 2, %r5, %p2;"
    assert compute(text, 0x3C004000, 0x40003C00) == 1


def test_pairs_of_floats():
    text = "mov.b64 %rd8, {%r2, %r3}; mul.f32x2 %rd9, %rd8, %rd8; mov.b64 {%r8, %r7}, %rd9;"
    text += "add.f32 %r9, %r8, %r7;"
    assert number(compute(text, bits(3.0), bits(-4.0))) == 25.0


def test_halves_added_to_floats():
    text = "cvt.u16.u32 %rs1, %r2; fma.rn.f32.bf16 %r9, %rs1, %rs1, %r3;"
    assert number(compute(text, 0x4040, bits(0.25))) == 9.25
    text = "cvt.u16.u32 %rs1, %r2; sub.rn.f32.f16 %r9, %rs1, %r3;"
    assert number(compute(text, 0x3C00, bits(0.25))) == 0.75
    with pytest.raises(PtxError, match=r"max\.f32\.bf16"):
        compute("max.f32.bf16 %r9, %r2, %r3;", 0, 0)


def test_shuffles_and_votes():
    body = """
        shfl.sync.bfly.b32 %r2, %r0, 5, 31, -1;
        shfl.sync.idx.b32 %r3, %r0, 7, 31, -1;
        shfl.sync.up.b32 %r4, %r0, 1, 0, -1;
        setp.lt.u32 %p1, %r0, 3;
        vote.sync.ballot.b32 %r5, %p1, -1;
        redux.sync.max.s32 %r6, %r0, -1;
    """
    body += address_of("%rd0", "%r0", 4, "%rd9")
    for n in range(5):
        body += f"st.global.b32 [ %rd9 + {128 * n} ], {{ %r{2 + n} }};\n"
    output = torch.zeros(5, 32, dtype=torch.int32)
    assert run_ptx(body, output) == []
    lanes = list(range(32))
    assert output.tolist() == [
        [lane ^ 5 for lane in lanes],
        [7] * 32,
        [max(lane - 1, 0) for lane in lanes],
        [7] * 32,
        [31] * 32,
    ]


def test_loops_and_threads_that_part_ways():
    # Thread n adds up 1 to n, those of odd CTAs in a loop of their own.
    body = """
        mov.b32 %r2, 0;
        mov.b32 %r3, 0;
        and.b32 %r4, %r1, 1;
        setp.eq.s32 %p1, %r4, 1;
        @%p1 bra $ODD;
    $EVEN:
        setp.ge.s32 %p2, %r3, %r0;
        @%p2 bra $STORE;
        add.s32 %r3, %r3, 1;
        add.s32 %r2, %r2, %r3;
        bra.uni $EVEN;
    $ODD:
        setp.ge.s32 %p2, %r3, %r0;
        @%p2 bra $STORE;
        add.s32 %r3, %r3, 1;
        sub.s32 %r2, %r2, %r3;
        bra.uni $ODD;
    $STORE:
        shl.b32 %r5, %r1, 5;
        add.s32 %r5, %r5, %r0;
    """
    body += address_of("%rd0", "%r5", 4, "%rd9") + "st.global.b32 [ %rd9 + 0 ], { %r2 };"
    output = torch.zeros(5, 32, dtype=torch.int32)
    assert run_ptx(body, output, ctas=5) == []
    sums = [n * (n + 1) // 2 for n in range(32)]
    assert output.tolist() == [[s * (-1) ** cta for s in sums] for cta in range(5)]


def test_what_is_not_known_is_an_error_that_names_the_line():
    body = "mov.b32 %r2, 0;\nfrobnicate.b32 %r2, %r2;"
    line = write_kernel(body, 0).split("\n").index("frobnicate.b32 %r2, %r2;") + 1
    with pytest.raises(PtxError, match=f"line {line}: .*frobnicate"):
        run_ptx(body)
    with pytest.raises(PtxError, match="rz"):
        run_ptx("add.rz.f32 %r2, %r3, %r4;")
    with pytest.raises(PtxError, match=r"add\.f32"):
        run_ptx("add.f32 %r2, %r3, %r4, %r5;")
    with pytest.raises(PtxError, match="%r999"):
        run_ptx("add.s32 %r2, %r999, 1;")
    with pytest.raises(PtxError, match="%clock"):
        run_ptx("mov.u32 %r2, %clock;")


def test_scopes_of_inline_assembly():
    text = "{ .reg .b32 %r2; mov.b32 %r2, 5; mov.b32 %r9, %r2; }"
    assert compute("mov.b32 %r2, 3; " + text + " add.s32 %r9, %r9, %r2;") == 8
    kernel = parse(write_kernel(text, 2))
    assert kernel.parameters == [("kernel_param_0", "u64"), ("kernel_param_1", "u64")]


def test_what_was_never_written_is_poison():
    assert math.isnan(number(compute("add.f32 %r9, %r50, 0f3F800000;")))
