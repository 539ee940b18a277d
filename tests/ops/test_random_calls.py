"""Any call of any op agrees with its reference, whatever its shapes, options and layouts are.

`--examples 50` tries as many of each; `--compiled sm_90` executes what is compiled for a GPU, where
an access between the elements of a tensor is an error.
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from memory_forms import Placed, place_gradients
from random_calls import Call, Layout, calls

import fastattn
from fastattn.checking import compare_results, measure_reference, outputs_and_gradients
from support import DEVICE, OPERATIONS

LEARNED = ("dalibi_slopes", "dbias")
"""Gradients of what is added to attention's scores."""


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_call_in_any_layout(name: str, request: pytest.FixtureRequest):
    operation = OPERATIONS[name]

    @settings(
        max_examples=request.config.getoption("--examples"),
        deadline=None,
        derandomize=True,
        database=None,
        # Of what fails the first is shown: each step towards a smaller one compiles kernels anew.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls(name))
    def check(call: Call) -> None:
        sample, dtype = Placed(call.sample, call.forms), call.dtype
        function, reference = (
            place_gradients(function, call.gradient)
            for function in (operation.function, operation.reference)
        )
        with fastattn.backend("triton"):
            actual = outputs_and_gradients(function, sample, dtype, str(DEVICE))
        measured = measure_reference(
            lambda change: outputs_and_gradients(
                reference, sample, dtype, str(DEVICE), change=change
            )
        )
        if name.startswith("attention") and dtype.itemsize == 2:
            # They hold the rounding of o as well: test_attention_rounding.py says how much.
            actual = {key: x for key, x in actual.items() if key not in LEARNED}
        failed = [one for one in compare_results(actual, measured) if not one.passed]
        assert not failed, (sample.arguments, failed)

    check()


def test_a_layout_means_the_same_numbers():
    x = torch.arange(24.0).reshape(2, 3, 4)
    layout = Layout(order=2, gaps=(1, 0, 3), step=2, offset=5, expanded=(False,) * 3)
    placed = layout(x)
    assert torch.equal(placed, x)
    # The second dimension outermost, then the first, then the last.
    assert (placed.stride(), placed.storage_offset()) == ((9, 18, 2), 5)
    expanded = Layout(order=0, gaps=(0, 0, 0), step=1, offset=0, expanded=(False, True, False))(x)
    assert expanded.stride(1) == 0
    assert torch.equal(expanded, x[:, :1].expand(2, 3, 4))
