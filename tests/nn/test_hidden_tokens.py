"""Tokens that a mask hides may be anything, NaN too: modules give the other tokens what they do
beside ordinary numbers. torch's own modules do not, where kernels leave the work to them.

The weights that such tokens go through have a gradient of NaN all the same: it is a sum over all
tokens, and 0 times NaN is NaN. Those of other tokens have theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn import nn
from support import DEVICE, WIDEST, same_bits

kernels = pytest.mark.kernels
every_garbage = pytest.mark.parametrize(
    "garbage", [math.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (math.inf, -math.inf))]
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
Function = Callable[[torch.Tensor], torch.Tensor]

HIDDEN = torch.zeros(2, 40, dtype=torch.bool)
"""At the end of the first sequence, and at the beginning of the second as well as inside it."""
HIDDEN[0, 33:] = HIDDEN[1, :3] = HIDDEN[1, 20] = True


def tokens(length: int, device: Any) -> torch.Tensor:
    return torch.randn(2, length, 16, dtype=WIDEST).to(device)


def made(kind: type, *sizes: Any, device: Any, **options: Any) -> Any:
    return kind(*sizes, **options).to(device, WIDEST)


def compare(
    module: torch.nn.Module, function: Function, context: torch.Tensor, garbage: float, lost: str
) -> None:
    """Outputs for queries of their own, and gradients of all parameters but those `lost`."""
    hidden = HIDDEN.to(context.device)[..., None]
    outputs, gradients = [], []
    for number in (0.0, garbage):
        output = function(context.masked_fill(hidden, number))
        weights = torch.linspace(-1.0, 1.0, output.numel(), device=output.device).to(WIDEST)
        found = torch.autograd.grad(
            output, list(module.parameters()), weights.view(output.shape), allow_unused=True
        )
        outputs.append(output)
        gradients.append(found)
    assert outputs[0].isfinite().all()
    assert same_bits(*outputs)
    names = [name for name, _ in module.named_parameters()]
    compared = 0
    for name, a, b in zip(names, *gradients, strict=True):
        if re.search(lost, name) or a is None:
            continue
        compared += 1
        assert same_bits(a, b), name
    assert compared


def seen_tokens(function: Function, x: torch.Tensor, garbage: float) -> None:
    """Outputs for the tokens that are seen, of those that see each other."""
    hidden = HIDDEN.to(x.device)
    plain, found = (function(x.masked_fill(hidden[..., None], n))[~hidden] for n in (0.0, garbage))
    assert plain.isfinite().all()
    assert same_bits(found, plain)


@kernels
@every_garbage
def test_multihead_attention(garbage):
    queries, context, hidden = tokens(21, DEVICE), tokens(40, DEVICE), HIDDEN.to(DEVICE)
    module = made(nn.MultiheadAttention, 16, 2, batch_first=True, device=DEVICE)
    options = {"key_padding_mask": hidden, "need_weights": False}

    compare(
        module,
        lambda x: module(queries, x, x, **options)[0],
        context,
        garbage,
        lost="in_proj_weight",
    )
    seen_tokens(lambda x: module(x, x, x, **options)[0], context, garbage)


@kernels
@every_garbage
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first, training, garbage):
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    module = made(nn.TransformerEncoder, layer, 2, device=DEVICE, enable_nested_tensor=False)
    module.train(training)
    hidden = HIDDEN.to(DEVICE)
    with torch.set_grad_enabled(training):
        seen_tokens(lambda x: module(x, src_key_padding_mask=hidden), tokens(40, DEVICE), garbage)


@kernels
@every_garbage
def test_transformer_decoder(garbage):
    layer = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    module = made(nn.TransformerDecoder, layer, 2, device=DEVICE)
    queries, context, hidden = tokens(21, DEVICE), tokens(40, DEVICE), HIDDEN.to(DEVICE)

    compare(
        module,
        lambda x: module(queries, x, memory_key_padding_mask=hidden),
        context,
        garbage,
        lost="multihead_attn.in_proj_weight",
    )
    padded = queries.clone()
    seen = slice(17)
    results = []
    for number in (0.0, garbage):
        padded[:, seen.stop :] = number
        padding = torch.arange(21, device=DEVICE).expand(2, 21) >= seen.stop
        results.append(module(padded, context, tgt_key_padding_mask=padding)[:, seen])
    assert same_bits(*results)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=kernels)])
@every_garbage
@pytest.mark.parametrize("qk_norm", [None, nn.RMSNorm])
def test_attention(qk_norm, garbage, backend):
    device = DEVICE if backend == "triton" else "cpu"
    module = made(nn.Attention, 16, 2, bias=True, qk_norm=qk_norm, device=device)
    queries, context = tokens(21, device), tokens(40, device)
    seen = ~HIDDEN.to(device)[:, None, None]
    with fastattn.backend(backend):
        compare(
            module,
            lambda x: module(queries, x, mask=seen),
            context,
            garbage,
            # A norm's gradient at what is not finite is none, whatever comes in.
            lost=r"[kv]_proj\.weight" if qk_norm is None else r"k_norm|k_proj|v_proj\.weight",
        )
        seen_tokens(lambda x: module(x, mask=seen), context, garbage)
