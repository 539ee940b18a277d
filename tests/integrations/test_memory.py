"""On kernels nothing of the size of the scores is ever made: neither masks nor weights."""

from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from fastattn.integrations.transformers import attention_forward

LENGTH = 512
REAL = torch.arange(LENGTH) >= torch.tensor([[9], [0]])
PACKED = torch.cat([torch.arange(n) for n in (100, 30, 250, 132)]).expand(2, LENGTH)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any tensor made meanwhile has memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return result


@pytest.mark.kernels
@pytest.mark.parametrize(
    "given",
    [{}, {"attention_mask": REAL}, {"position_ids": PACKED}],
    ids=["plain", "padded", "packed"],
)
@pytest.mark.parametrize("maker", [create_causal_mask, create_sliding_window_causal_mask])
def test_memory_is_linear(maker: Any, given: dict[str, Any]):
    config = transformers.MistralConfig(sliding_window=64)
    config._attn_implementation = "fastattn"
    inputs = {"attention_mask": None, "position_ids": None, **given}
    q, k, v = (torch.randn(2, 1, LENGTH, 16, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        mask = maker(config=config, inputs_embeds=torch.empty(2, LENGTH, 4), cache=None, **inputs)
        output, _ = attention_forward(
            torch.nn.Module(), q, k, v, mask, position_ids=inputs["position_ids"]
        )
        output.sum().backward()
    assert largest.elements <= 4 * LENGTH * 16
