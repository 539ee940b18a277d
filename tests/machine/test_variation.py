"""What PTX leaves open is varied as far as it says, and no further."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from machine_support import address_of, run_ptx

from fastattn.machine.variation import Variation

Bound = Callable[[np.ndarray, np.ndarray], np.ndarray]


def ulps(count: int) -> Bound:
    """An ulp is the distance of neighbours among float32 numbers of that size."""
    return lambda exact, _: count * 2.0 ** (np.floor(np.log2(abs(exact))) - 23)


FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, float, Bound]] = {
    "ex2.approx.f32": (np.exp2, -100, 100, ulps(2)),
    "ex2.approx.ftz.f32": (np.exp2, -3, 3, ulps(2)),
    "lg2.approx.f32": (np.log2, 0.51, 1.99, lambda exact, _: np.full(exact.shape, 2.0**-22)),
    "lg2.approx.ftz.f32": (np.log2, 2, 1e6, lambda exact, _: 2.0**-22 * abs(exact)),
    "sin.approx.f32": (np.sin, -6.2, 6.2, lambda exact, _: np.full(exact.shape, 2.0**-20.5)),
    "cos.approx.f32": (np.cos, -300, -7, lambda exact, _: np.full(exact.shape, 2.0**-14.7)),
    "rcp.approx.f32": (lambda x: 1 / x, -50, -0.01, ulps(1)),
    "sqrt.approx.f32": (np.sqrt, 0.1, 1e9, lambda exact, _: 2.0**-23 * exact),
    "rsqrt.approx.f32": (lambda x: x**-0.5, 0.1, 1e9, lambda exact, _: 2.0**-22.9 * exact),
    "tanh.approx.f32": (np.tanh, 0.01, 5, lambda exact, _: 2.0**-11 * exact),
}
"""What NVIDIA's PTX ISA 9.1 says in section 9.7.3, by instruction: where, and how far off."""


def compute(name: str, seed: int | None, *operands: torch.Tensor) -> np.ndarray:
    """An instruction on float32 numbers."""
    count = operands[0].numel()
    output = torch.zeros(count)
    body, registers = "", []
    for n, _ in enumerate(operands):
        body += address_of(f"%rd{n}", "%r0", 4, "%rd9")
        body += f"ld.global.b32 {{ %r{2 + n} }}, [ %rd9 + 0 ];"
        registers.append(f"%r{2 + n}")
    body += f"{name} %r9, {', '.join(registers)};" + address_of(
        f"%rd{len(operands)}", "%r0", 4, "%rd9"
    )
    body += "st.global.b32 [ %rd9 + 0 ], { %r9 };"
    variation = None if seed is None else Variation(seed)
    assert run_ptx(body, *operands, output, threads=count, variation=variation) == []
    return output.numpy().astype(np.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_approximate_instructions_are_off_by_what_is_documented(name: str):
    function, first, last, bound = FUNCTIONS[name]
    x = torch.linspace(first, last, 512)
    exact = function(x.double().numpy())
    found = [compute(name, seed, x) for seed in (1, 2, 3)]
    allowed = bound(exact, x.numpy())
    errors = np.stack([abs(one - exact) / allowed for one in found])
    assert errors.max() <= 1.0
    assert errors.max() > 0.8, "a variation should use what is allowed"
    assert not np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], compute(name, 1, x)), "a GPU repeats its errors"
    plain = compute(name, None, x)
    assert (abs(plain - exact) <= ulps(1)(exact, x.numpy()) / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["div.full.f32", "div.full.ftz.f32", "div.approx.f32"])
def test_divisions_are_off_by_two_units(name: str):
    a, b = torch.linspace(0.3, 70, 256), torch.linspace(-9, -0.2, 256)
    exact = a.double().numpy() / b.double().numpy()
    errors = abs(compute(name, 1, a, b) - exact) / ulps(2)(exact, exact)
    assert 0.8 < errors.max() <= 1.0


def test_what_is_rounded_is_not_varied():
    x = torch.linspace(0.3, 70, 64)
    for name in ("rcp.rn.f32", "sqrt.rn.f32"):
        assert np.array_equal(compute(name, 1, x), compute(name, None, x))
    assert np.array_equal(compute("div.rn.f32", 1, x, x + 1), compute("div.rn.f32", None, x, x + 1))


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("ex2.approx.f32", 0.0, 1.0),
        ("ex2.approx.f32", -math.inf, 0.0),
        ("ex2.approx.f32", math.inf, math.inf),
        ("lg2.approx.f32", 0.0, -math.inf),
        ("sin.approx.f32", 0.0, 0.0),
        ("cos.approx.f32", -0.0, 1.0),
        ("rcp.approx.f32", -math.inf, 0.0),
        ("rcp.approx.f32", 0.0, math.inf),
        ("rsqrt.approx.f32", math.inf, 0.0),
        ("tanh.approx.f32", math.inf, 1.0),
    ],
)
def test_what_the_tables_give_is_exact(name: str, x: float, expected: float):
    for seed in range(4):
        assert (compute(name, seed, torch.full((32,), x)) == expected).all()


ONE = 1 + 2.0**-12
"""Its square has a bit more than a float32."""

SUMS = {
    "mul.f32 %r5, %r2, %r2; add.f32 %r9, %r5, %r3;": {2.0**-11, 2.0**-11 + 2.0**-24},
    "mul.f32 %r5, %r2, %r2; sub.f32 %r9, %r4, %r5;": {-(2.0**-11), -(2.0**-11) - 2.0**-24},
    "mul.f32 %r5, %r2, %r2; neg.f32 %r6, %r2; mul.f32 %r7, %r6, %r2; add.f32 %r9, %r5, %r7;": {
        0.0,
        2.0**-24,
        -(2.0**-24),
    },
    "mul.rn.f32 %r5, %r2, %r2; add.f32 %r9, %r5, %r3;": {2.0**-11},
    "mul.f32 %r5, %r2, %r2; add.rn.f32 %r9, %r5, %r3;": {2.0**-11},
    "mul.f32 %r5, %r2, %r2; mov.b32 %r2, %r3; add.f32 %r9, %r5, %r3;": {2.0**-11},
}
"""What may come of a product and a sum, by the instructions on 1 + 2^-12, -1 and 1: nothing fused,
either product fused, and, where a rounding modifier or another factor stands in the way, no choice.
"""


@pytest.mark.parametrize("text", SUMS)
def test_every_way_of_fusing_products_into_sums_is_tried(text: str):
    inputs, found = torch.tensor([ONE, -1.0, 1.0]), set()
    for seed in range(24):
        output = torch.zeros(1)
        body = "".join(f"ld.global.b32 {{ %r{2 + n} }}, [ %rd0 + {4 * n} ];" for n in range(3))
        body += text + "st.global.b32 [ %rd1 + 0 ], { %r9 };"
        assert run_ptx(body, inputs, output, variation=Variation(seed)) == []
        found.add(output.item())
    assert found == SUMS[text]
