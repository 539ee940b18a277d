"""Who takes part: fastattn and PyTorch's own attention, asked as their users ask them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import fastattn
from fastattn.ops.core.backends import device_obstacle

from .case import ADDITIONS, MASKS, Absent, Case

BY_TENSOR = "by an M x N tensor"


@dataclass(frozen=True)
class Answer:
    """What a library computed, in the layout of the case, and in what roundabout way."""

    o: torch.Tensor
    lse: torch.Tensor | None = None
    how: str = ""


Attention = Callable[[Case], Answer]


@dataclass(frozen=True)
class Contender:
    """A library, or one of its ways.

    Attributes:
        name: in tables.
        load: imports it and gives the function.
        package: what must be installed.
        on_cpu: whether it computes there at all.
        remark: how it runs on a device, if that must be said.
    """

    name: str
    load: Callable[[], Attention]
    package: str = "torch"
    on_cpu: bool = True
    remark: Callable[[torch.device], str] = lambda device: ""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def obstacle(self, device: torch.device) -> str | None:
        """Why it has no column on a device, or None if it has one."""
        if not self.installed:
            return "is not installed there"
        return "needs a GPU" if device.type == "cpu" and not self.on_cpu else None


def packed_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) as (B * S, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def unpacked_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The opposite, for the batch elements of `like`."""
    return rows.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


def cumulative(lengths: list[int], like: torch.Tensor) -> torch.Tensor:
    """Where sequences begin and end."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=like.device)


def of_fastattn(case: Case) -> Answer:
    if case.causal_from_first:
        case.only("causal_from_first")
        torchs = fastattn.functional.scaled_dot_product_attention
        return Answer(torchs(case.q, case.k, case.v, is_causal=True, enable_gqa=case.group > 1))
    options: dict[str, Any] = {
        "causal": case.causal,
        "window": case.window,
        "mask": case.mask,
        "bias": case.bias,
        "alibi_slopes": case.slopes,
        "softcap": case.softcap,
        "sinks": case.sinks,
        "dropout_p": case.dropout_p,
        "kv_lengths": case.key_lengths,
        "document_ids": case.documents,
        "return_lse": case.return_lse,
    }
    if case.table is not None:
        options["relative_bias"] = fastattn.RelativeBias(case.table)
    if case.blocks is not None:
        options["block_mask"] = fastattn.BlockMask(case.blocks, case.block_size)
    if case.rate is not None or case.prefix is not None:
        from .own_terms import Decay, Prefix

        own = [Decay(case.rate)] if case.rate is not None else []
        options["score_mods"] = own + ([Prefix(case.prefix)] if case.prefix is not None else [])
    if case.lengths is None:
        found = fastattn.attention(case.q, case.k, case.v, **options)
        return Answer(*found) if case.return_lse else Answer(found)
    q, k, v = (packed_rows(x) for x in (case.q, case.k, case.v))
    given = {name: value for name, value in options.items() if name in case.asked()}
    of_queries, of_keys = case.lengths
    ends = cumulative(of_queries, q), cumulative(of_keys, q)
    o = fastattn.attention_varlen(q, k, v, *ends, max(of_queries), max(of_keys), **given)
    return Answer(unpacked_rows(o, case.q))


def remark_of_fastattn(device: torch.device) -> str:
    obstacle = device_obstacle(device.type, device.index)
    if obstacle is not None:
        return f"its reference in PyTorch, because {obstacle}"
    return "its kernels" if device.type != "cpu" else "its kernels, in Triton's interpreter"


def by_backend(backend: SDPBackend) -> Callable[[], Attention]:
    """`scaled_dot_product_attention` by one of its backends alone."""

    def attention(case: Case) -> Answer:
        with sdpa_kernel(backend), warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            try:
                return of_torch(case)
            except RuntimeError as error:
                if (reason := reason_of_refusal([str(x.message) for x in given])) is None:
                    raise
                raise RuntimeError(f"{str(error).splitlines()[0]} {reason}") from error

    return lambda: attention


def reason_of_refusal(warned: list[str]) -> str | None:
    """What PyTorch warns of beside an error that gives no reason."""
    for message in warned:
        if not message.rstrip().endswith("because:") and "runtime disabled" not in message:
            return message.partition(" (Triggered internally")[0]
    return None


def of_torch(case: Case) -> Answer:
    """PyTorch's `scaled_dot_product_attention`."""
    if case.lengths is not None:
        return nested(case)
    case.only(*MASKS, *ADDITIONS, "sinks", "dropout_p")
    q, k, v = case.q, case.k, case.v
    options: dict[str, Any] = {"dropout_p": case.dropout_p, "enable_gqa": case.group > 1}
    asked = case.asked() - {"dropout_p"}
    if asked == {"causal_from_first"} or (asked == {"causal"} and case.shift == 0):
        return Answer(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
    # With more queries than keys PyTorch warns that this gives NaN.
    if asked == {"causal"} and case.shift > 0:
        lower_right: Any = causal_lower_right(q.shape[2], k.shape[2])
        return Answer(F.scaled_dot_product_attention(q, k, v, lower_right, **options))
    tensor = case.score_tensor()
    if case.sinks is not None:
        tensor = with_sinks(case, tensor)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    # What a user has as a tensor anyway is no way round.
    built = asked not in (set(), {"mask"}, {"bias"}, {"key_lengths"})
    o = F.scaled_dot_product_attention(q, k, v, tensor, **options)
    return Answer(o, how=BY_TENSOR if built else "")


def with_sinks(case: Case, tensor: torch.Tensor | None) -> torch.Tensor:
    """The score tensor with a key more, of which the score is the sink, and the value to be 0."""
    assert case.sinks is not None
    scores = torch.zeros((), dtype=case.q.dtype, device=case.q.device)
    if tensor is not None and tensor.dtype is torch.bool:
        scores = torch.where(tensor, scores, float("-inf"))
    elif tensor is not None:
        scores = tensor
    scores = scores.expand(1, case.q.shape[1], case.q.shape[2], case.k.shape[2])
    column = case.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1)


def nested(case: Case) -> Answer:
    """Packed sequences as nested tensors."""
    case.only("lengths", "causal")
    assert case.lengths is not None
    if case.causal and case.lengths[0] != case.lengths[1]:
        raise Absent("nested tensors are causal from the first query and key on")
    # Nested tensors are of one shape where they share the tensor of their offsets.
    of_queries = of_keys = cumulative(case.lengths[0], case.q)
    if case.lengths[0] != case.lengths[1]:
        of_keys = cumulative(case.lengths[1], case.q)
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(packed_rows(x).contiguous(), ends).transpose(1, 2)
        for x, ends in ((case.q, of_queries), (case.k, of_keys), (case.v, of_keys))
    )
    o = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.group > 1)
    return Answer(unpacked_rows(o.transpose(1, 2).values(), case.q))


def flex() -> Attention:
    """FlexAttention; compiled on a GPU, in full in PyTorch on a CPU."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def attention(case: Case) -> Answer:
        others = ("softcap", "rate", "sinks", "lengths", "return_lse")
        case.only(*MASKS, *ADDITIONS, *others)
        mask = None
        if seen := mask_mod(case):
            queries, keys = case.q.shape[2], case.k.shape[2]
            # The function's results depend on the batch element, never on the head, but for `mask`.
            heads = case.q.shape[1] if case.mask is not None and case.mask.shape[1] > 1 else None
            size = case.block_size if case.blocks is not None else 128
            mask = create_block_mask(
                seen, case.q.shape[0], heads, queries, keys, str(case.q.device), BLOCK_SIZE=size
            )
        # What was compiled for another case would count towards the limit of versions.
        torch.compiler.reset()
        on_gpu = case.q.device.type != "cpu"
        function = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention
        with_lse = case.return_lse or case.sinks is not None
        o, auxiliary = function(
            case.q,
            case.k,
            case.v,
            score_mod=score_mod(case),
            block_mask=mask,
            enable_gqa=case.group > 1,
            return_aux=AuxRequest(lse=with_lse),
        )
        if case.sinks is None:
            return Answer(o, auxiliary.lse if case.return_lse else None)
        assert auxiliary.lse is not None
        share = torch.sigmoid(auxiliary.lse - case.sinks[:, None])
        return Answer((o * share[..., None]).to(o.dtype), how="by arithmetic on its LSE")

    return attention


def score_mod(case: Case) -> Any:
    """The scores' changes as a function of FlexAttention; None if there are none."""
    shift, softcap, bias = case.shift, case.softcap, case.bias
    slopes, rate, table = case.slopes, case.rate, case.table
    lookup, reach = case.buckets() if table is not None else (None, 0)
    if all(x is None for x in (softcap, bias, slopes, rate, table)):
        return None
    # Indices along dimensions that the bias is broadcast along.
    one = [size == 1 for size in bias.shape] if bias is not None else []

    def changed(score: Any, b: Any, h: Any, m: Any, n: Any) -> Any:
        distance = m + shift - n
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if rate is not None:
            score = score * torch.exp2(-rate[h] * distance.abs())
        if bias is not None:
            score = score + bias[tuple(i * (not o) for i, o in zip((b, h, m, n), one, strict=True))]
        if slopes is not None:
            score = score - slopes[h] * distance.abs()
        if table is not None and lookup is not None:
            score = score + table[lookup[(-distance).clamp(-reach, reach) + reach], h]
        return score

    return changed


def mask_mod(case: Case) -> Any:
    """The masks as a function of FlexAttention; None if there are none."""
    rules: list[Any] = []
    shift = case.shift
    if case.lengths is not None:
        return mask_mod_of_packed(case)
    if case.causal:
        rules.append(lambda b, h, m, n: m + shift >= n)
    if case.causal_from_first:
        rules.append(lambda b, h, m, n: m >= n)
    if case.window is not None:
        before, after = case.window
        if before is not None:
            rules.append(lambda b, h, m, n: m + shift - n <= before)
        if after is not None:
            rules.append(lambda b, h, m, n: n - m - shift <= after)
    if (mask := case.mask) is not None:
        one = [size == 1 for size in mask.shape]
        rules.append(
            lambda b, h, m, n: mask[
                tuple(i * (not o) for i, o in zip((b, h, m, n), one, strict=True))
            ]
        )
    if (lengths := case.key_lengths) is not None:
        rules.append(lambda b, h, m, n: n < lengths[b])
    if (documents := case.documents) is not None:
        rules.append(lambda b, h, m, n: documents[b, m] == documents[b, n])
    if (blocks := case.blocks) is not None:
        size = case.block_size
        rules.append(lambda b, h, m, n: blocks[m // size, n // size])
    if (prefix := case.prefix) is not None:
        rules.append(lambda b, h, m, n: (m >= n) | (n < prefix[b]))
    return all_of(rules)


def mask_mod_of_packed(case: Case) -> Any:
    """Packed sequences as one, in which each sees itself alone."""
    assert case.lengths is not None
    places, numbers = [], []
    for lengths in case.lengths:
        numbers.append(torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)]))
        places.append(torch.tensor([i for length in lengths for i in range(-length, 0)]))
    of_query, of_key = (x.to(case.q.device) for x in numbers)
    query_place, key_place = (x.to(case.q.device) for x in places)
    rules = [lambda b, h, m, n: of_query[m] == of_key[n]]
    if case.causal:
        rules.append(lambda b, h, m, n: query_place[m] >= key_place[n])
    return all_of(rules)


def all_of(rules: list[Any]) -> Any:
    """One function that asks for all of them; None if there are none."""
    from torch.nn.attention.flex_attention import and_masks

    return and_masks(*rules) if rules else None


def remark_of_flex(device: torch.device) -> str:
    if device.type == "cpu":
        return "in full in PyTorch; on a CPU it has no backward pass, compiled or not"
    return "compiled"


def varlen() -> Attention:
    """PyTorch's `varlen_attn`; a batch is packed sequences of one length."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    def attention(case: Case) -> Answer:
        case.only("lengths", "causal", "window", "return_lse")
        batch, _, queries, _ = case.q.shape
        uniform = [queries] * batch, [case.k.shape[2]] * batch
        of_queries, of_keys = case.lengths or uniform
        before, after = case.window or (None, None)
        found: Any = varlen_attn(
            packed_rows(case.q),
            packed_rows(case.k),
            packed_rows(case.v),
            cumulative(of_queries, case.q),
            cumulative(of_keys, case.q),
            max(of_queries),
            max(of_keys),
            return_aux=AuxRequest(lse=True) if case.return_lse else None,
            window_size=(
                -1 if before is None else before,
                0 if case.causal else -1 if after is None else after,
            ),
            enable_gqa=case.group > 1,
        )
        if not case.return_lse:
            return Answer(unpacked_rows(found, case.q))
        o, lse = found
        # (T, H), or (H, T) in some versions.
        lse = lse if lse.shape[1] == case.q.shape[1] else lse.T
        return Answer(unpacked_rows(o, case.q), unpacked_rows(lse, case.q))

    return attention
