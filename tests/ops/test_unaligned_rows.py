"""Cross entropy and log-probabilities of rows that begin anywhere, as with 50,257 classes."""

import math
from typing import Any

import pytest
import torch

import fastattn
from fastattn.checking import check_sample
from fastattn.ops.core.catalog import OPERATIONS, Sample
from fastattn.ops.cross_entropy_samples import class_weights, targets
from support import DEVICE, WIDEST

pytestmark = pytest.mark.kernels

CLASSES = 1031
"""A prime, so that rows begin at every address there is; more than one program's rows are wide."""

DTYPES = [torch.float16, torch.bfloat16, torch.float32, WIDEST]

OPTIONS: dict[str, dict[str, Any]] = {
    "cross_entropy": {
        "weight": class_weights(CLASSES),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 5.0,
        "return_lse": True,
    },
    "log_prob": {"return_entropy": True, "temperature": 0.7},
}


@pytest.mark.parametrize("dtype", dict.fromkeys(DTYPES), ids=str)
@pytest.mark.parametrize("op", OPTIONS)
def test_accuracy(op, dtype):
    target = targets((9,), CLASSES, ignored=-100)
    sample = Sample("odd width", logits=(9, CLASSES), target=target, **OPTIONS[op])
    for comparison in check_sample(OPERATIONS[op], sample, dtype, str(DEVICE)):
        assert comparison.passed, comparison


@pytest.mark.parametrize("dtype", dict.fromkeys(DTYPES), ids=str)
@pytest.mark.parametrize("classes", [CLASSES, 1026])
def test_each_logit_of_a_row_counts_once(classes, dtype):
    """A row that is all -inf but for two equal logits: their entropy is that of a coin."""
    ends = [*range(18), *range(classes - 18, classes)]
    place = torch.tensor(ends)
    other = classes // 2
    logits = torch.full((len(ends), classes), -math.inf)
    logits[torch.arange(len(ends)), place] = 3.0
    logits[:, other] = 3.0
    log_prob, entropy, correct = fastattn.log_prob(
        logits.to(DEVICE, dtype), place.to(DEVICE), return_entropy=True, return_correct=True
    )
    coin = torch.full((len(ends),), math.log(2.0), dtype=log_prob.dtype)
    torch.testing.assert_close(log_prob.cpu(), -coin)
    torch.testing.assert_close(entropy.cpu(), coin)
    # Of equal logits the first one is what greedy decoding takes.
    assert correct.cpu().tolist() == (place < other).tolist()


@pytest.mark.parametrize("place", [0, 3, CLASSES - 1])
def test_neighbouring_rows_do_not_show(place):
    """What lies before and after a row in memory is another row's."""
    logits = torch.randn(3, CLASSES).to(DEVICE, torch.bfloat16)
    target = torch.full((3,), place).to(DEVICE)
    expected = fastattn.cross_entropy(logits, target, reduction="none")
    changed = logits.clone()
    changed[0] = math.nan
    changed[2] = math.inf
    found = fastattn.cross_entropy(changed, target, reduction="none")
    assert found[1] == expected[1]
    assert not found[0].isfinite()
    assert not found[2].isfinite()


@pytest.mark.parametrize("dtype", dict.fromkeys(DTYPES), ids=str)
def test_a_row_has_its_bits_wherever_it_begins(dtype):
    """Where whole loads begin differs from row to row; the order of a sum must not."""
    logits = torch.randn(6, 4 * CLASSES).to(DEVICE, dtype)
    target = torch.arange(6).to(DEVICE)
    options = {"return_entropy": True, "softcap": 5.0}
    together = fastattn.log_prob(logits, target, **options)
    for row in range(6):
        alone = fastattn.log_prob(logits[row : row + 1].clone(), target[row : row + 1], **options)
        assert all(map(torch.equal, alone, (x[row : row + 1] for x in together)))
