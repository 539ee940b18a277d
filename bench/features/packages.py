"""flash-attn and xformers, asked as their users ask them, and the list of all contenders."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend

from .case import ADDITIONS, MASKS, Absent, Case
from .contenders import (
    BY_TENSOR,
    Answer,
    Attention,
    Contender,
    by_backend,
    cumulative,
    flex,
    of_fastattn,
    packed_rows,
    remark_of_fastattn,
    remark_of_flex,
    unpacked_rows,
    varlen,
)

BY_PACKING = "by packing"


def document_lengths(documents: torch.Tensor) -> list[int]:
    """Of documents that follow one another, batch element by batch element."""
    counts = [torch.unique_consecutive(row, return_counts=True)[1] for row in documents]
    return torch.cat(counts).tolist()


def flash_attention() -> Attention:
    """flash-attn 2."""
    from flash_attn import (  # type: ignore[import-not-found]
        flash_attn_func,
        flash_attn_varlen_func,
    )

    def attention(case: Case) -> Answer:
        case.only(
            *("causal", "window", "softcap", "slopes", "dropout_p", "return_lse"),
            *("lengths", "documents", "key_lengths"),
        )
        before, after = case.window or (None, None)
        options: dict[str, Any] = {
            "dropout_p": case.dropout_p,
            "causal": case.causal,
            "window_size": (-1 if before is None else before, -1 if after is None else after),
            "softcap": case.softcap or 0.0,
            "alibi_slopes": case.slopes,
            "return_attn_probs": case.return_lse,
        }
        lengths = packed_lengths(case)
        if lengths is None:
            found = flash_attn_func(
                *(x.transpose(1, 2) for x in (case.q, case.k, case.v)), **options
            )
            o = found[0] if case.return_lse else found
            return Answer(o.transpose(1, 2), found[1] if case.return_lse else None)
        q, k, v = (packed_rows(x) for x in (case.q, case.k, case.v))
        if case.key_lengths is not None:
            counted = torch.arange(case.k.shape[2], device=q.device) < case.key_lengths[:, None]
            k, v = (x[counted.flatten()] for x in (k, v))
        ends = [cumulative(own, q) for own in lengths]
        o = flash_attn_varlen_func(q, k, v, *ends, *(max(own) for own in lengths), **options)
        return Answer(unpacked_rows(o, case.q), how="" if case.lengths else BY_PACKING)

    return attention


def packed_lengths(case: Case) -> tuple[list[int], list[int]] | None:
    """The lengths of queries and keys where a case is one of packed sequences, or can be."""
    if case.documents is not None:
        lengths = document_lengths(case.documents)
        return lengths, lengths
    if case.key_lengths is not None:
        if case.causal:
            raise Absent("the last query stands at the last key that counts")
        return [case.q.shape[2]] * case.q.shape[0], case.key_lengths.tolist()
    return case.lengths


def xformers() -> Attention:
    """xformers' `memory_efficient_attention`, with the kernels that it chooses."""
    from xformers.ops import fmha  # type: ignore[import-not-found]

    def attention(case: Case) -> Answer:
        others = ("dropout_p", "lengths", "return_lse")
        case.only(*MASKS, *ADDITIONS, *others)
        structure, packs = structured_mask(fmha.attn_bias, case)
        q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, case.v))
        if packs:
            q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        tensor = None
        if structure is None and (tensor := case.score_tensor()) is not None:
            shape = (*case.q.shape[:3], case.k.shape[2])
            if tensor.dtype is torch.bool:
                nothing = torch.zeros((), dtype=q.dtype, device=q.device)
                tensor = torch.where(tensor, nothing, float("-inf"))
            # A bias of full size is handed over as it is, so that it may get its gradient.
            tensor = tensor if tensor.shape == shape else tensor.expand(shape)
        if (group := case.group) > 1:
            q = q.unflatten(2, (-1, group))
            k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
            tensor = None if tensor is None else tensor.unflatten(1, (-1, group))
        bias = tensor if structure is None else structure
        built = tensor is not None and case.asked() not in ({"mask"}, {"bias"})
        if case.return_lse:
            o, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, bias)
            o, lse = (o.flatten(2, 3), lse.flatten(1, 2)) if group > 1 else (o, lse)
            return Answer(o.transpose(1, 2), lse[..., : case.q.shape[2]])
        o = fmha.memory_efficient_attention(q, k, v, bias, p=case.dropout_p)
        o = o.flatten(2, 3) if group > 1 else o
        o = unpacked_rows(o[0], case.q) if packs else o.transpose(1, 2)
        return Answer(
            o, how=BY_TENSOR if built else BY_PACKING if case.documents is not None else ""
        )

    return attention


def structured_mask(masks: Any, case: Case) -> tuple[Any, bool]:
    """The mask as one of xformers' classes, if one says it, and whether sequences are packed."""
    asked = case.asked() - {"dropout_p", "return_lse"}
    if asked <= {"lengths", "causal"} and case.lengths is not None:
        packed = masks.BlockDiagonalMask.from_seqlens(*case.lengths, device=case.q.device)
        return (packed.make_causal_from_bottomright() if case.causal else packed), True
    if asked <= {"documents", "causal"} and case.documents is not None:
        lengths = document_lengths(case.documents)
        packed = masks.BlockDiagonalMask.from_seqlens(lengths, device=case.q.device)
        return (packed.make_causal() if case.causal else packed), True
    if asked == {"causal"}:
        return masks.LowerTriangularFromBottomRightMask(), False
    if asked == {"causal_from_first"}:
        return masks.LowerTriangularMask(), False
    before, after = case.window or (None, None)
    if asked == {"causal", "window"} and before is not None:
        return masks.LowerTriangularFromBottomRightLocalAttentionMask(before + 1), False
    if asked == {"window"} and before is not None and after is not None:
        return masks.LocalAttentionFromBottomRightMask(before, after), False
    return None, False


CONTENDERS = (
    Contender("fastattn", lambda: of_fastattn, remark=remark_of_fastattn),
    Contender("SDPA cuDNN", by_backend(SDPBackend.CUDNN_ATTENTION), on_cpu=False),
    Contender("SDPA flash", by_backend(SDPBackend.FLASH_ATTENTION)),
    Contender("SDPA efficient", by_backend(SDPBackend.EFFICIENT_ATTENTION), on_cpu=False),
    Contender("SDPA math", by_backend(SDPBackend.MATH)),
    Contender("FlexAttention", flex, remark=remark_of_flex),
    Contender(
        "varlen_attn",
        varlen,
        on_cpu=False,
        remark=lambda device: "PyTorch's, for packed sequences",
    ),
    Contender("flash-attn", flash_attention, package="flash_attn", on_cpu=False),
    Contender("xformers", xformers, package="xformers", on_cpu=False),
)

NOT_TRIED = {
    "Liger-Kernel": "has no attention of queries, keys and values; its norms, losses and "
    "activations are compared by `make bench`",
}
"""Libraries that come to mind, and why they have no column."""
