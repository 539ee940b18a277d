"""Quantized checkpoints: transformers reads the same weights of them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_support import in_fp8, in_mxfp4

from fastattn import models
from fastattn.ops.core.backends import INTERPRETED


# transformers restores weights of whole blocks alone.
@pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (partial(in_fp8, block=(8, 8)), "DeepseekV3ForCausalLM"),
        (in_mxfp4, "GptOssForCausalLM"),
    ],
)
def test_weights_are_those_of_transformers(write: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path)
    ours = models.from_pretrained(tmp_path)
    theirs = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    found = ours.state_dict()
    for theirs_name, tensor in theirs.state_dict().items():
        own = found[theirs_name.replace(".mlp.router.", ".mlp.gate.")]
        assert torch.equal(own, tensor), theirs_name
