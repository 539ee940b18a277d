"""A comparison whose error is infinite says why."""

import pytest
import torch

from fastattn.checking import compare_tensors

INFINITE, LARGE = float("inf"), 1e5


@pytest.mark.parametrize(
    ("actual", "reference", "truth", "note"),
    [
        ([1.0, INFINITE], [1.0, INFINITE], [1.0, LARGE], "both overflow"),
        ([1.0, INFINITE], [1.0, 2.0], [1.0, 2.0], "it overflows, and its reference does not"),
        ([1.0, 2.0], [1.0, INFINITE], [1.0, INFINITE], "finite where float64 is not"),
        ([-INFINITE, 2.0], [INFINITE, 2.0], [INFINITE, 2.0], "other infinities"),
        ([1.0], [1.0, 2.0], [1.0, 2.0], "another shape"),
        (None, [1.0, 2.0], [1.0, 2.0], "there is none"),
        ([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], ""),
    ],
)
def test_an_infinite_error_has_a_note(actual, reference, truth, note):
    found = compare_tensors(
        "y",
        None if actual is None else torch.tensor(actual, dtype=torch.float16),
        [(torch.tensor(reference, dtype=torch.float16), torch.tensor(truth, dtype=torch.float64))],
        factor=2.0,
    )
    assert found.note.startswith(note)
    assert found.passed is not bool(note)
