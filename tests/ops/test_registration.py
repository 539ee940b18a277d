"""Registered launchers: what DTensor needs of their signatures."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn.ops.norm import norm_forward
from fastattn.ops.registration import launcher
from fastattn.ops.sharding import rowwise


def test_settings_that_dtensor_would_not_see_are_refused():
    # DTensor would take the outputs of one call for those of another that differs in `wide` alone.
    def misplaced(x: torch.Tensor, wide: bool, dtype: torch.dtype) -> torch.Tensor:
        return x.new_empty(x.shape[0] if wide else 1, dtype=dtype)

    with pytest.raises(TypeError, match=r"misplaced: dtypes and integers must come before .*bool"):
        launcher("nowhere", sharding=rowwise((0,), (0,)))(misplaced)
    assert not hasattr(torch.ops.fastattn, "misplaced")


def test_absent_outputs_stay_absent_where_the_op_has_none():
    arguments = (None, None, None, None, 1e-6, 0.0, 0.0, torch.float32, False, "float32")
    with FakeTensorMode():
        y, hidden, mean, rstd = norm_forward(torch.empty(3, 8), *arguments)
    assert y.shape == (3, 8)
    assert hidden is None
    assert mean is None
    assert rstd.shape == (3,)
