"""Rotary positions, for one tensor or for queries and keys at once."""

from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from ..reference.rotary import split_tables
from .core.apply import call
from .core.arguments import whole_number
from .core.backends import use_triton
from .core.catalog import Sample, operation
from .core.lazy_imports import lazy_module
from .core.registration import kernel_op
from .rotary_arguments import check_form, check_rotary, pair_tables
from .rotary_samples import angles, integers

if TYPE_CHECKING:
    from ..kernels import rotary as kernels
else:
    kernels = lazy_module("fastattn.kernels.rotary")


def shard_heads(*args: Any) -> list[tuple[list[Any], list[Any]]]:
    """DTensor's rule: heads and batch entries stay sharded, and tokens that bring their angles."""
    from torch.distributed.tensor import Replicate, Shard

    _, k, cos, sin, positions, cu_seqlens, *scalars = args
    by_token = len(cos.shape) == 3

    def acceptable(heads: Any, table: Any, position: Any) -> tuple[list[Any], list[Any]]:
        inputs = [
            heads,
            None if k is None else heads,
            table,
            None if sin is None else table,
            None if positions is None else position,
            None if cu_seqlens is None else Replicate(),
            *[None] * len(scalars),
        ]
        return [heads, heads], inputs

    whole = Replicate()
    found = [acceptable(whole, whole, whole), acceptable(Shard(1), whole, whole)]
    if cu_seqlens is None:
        # What has one entry for the whole batch is needed by all of it.
        table = Shard(0) if by_token and cos.shape[0] > 1 else whole
        each = positions is not None and len(positions.shape) == 2 and positions.shape[0] > 1
        found.append(acceptable(Shard(0), table, Shard(0) if each else whole))
    if by_token:
        found.append(acceptable(Shard(2), Shard(1), whole))
    elif positions is not None:
        found.append(acceptable(Shard(2), whole, Shard(len(positions.shape) - 1)))
    return found


@kernel_op(kernels.rotary_forward, sharding=shard_heads)
def rotary_forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    offset: int,
    # An int and no bool: DTensor hears integers and what follows one, see `sharding.check_order`.
    q_heads_inside: int,
    k_heads_inside: int,
    interleaved: bool,
    inverse: bool,
    paired: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(q, k), both turned, see rotary_forward in kernels/rotary.py."""
    return _empty(q, q_heads_inside), None if k is None else _empty(k, k_heads_inside)


def _empty(x: torch.Tensor, heads_inside: int) -> torch.Tensor:
    batches, heads, length, head_dim = x.shape
    if heads_inside:
        return x.new_empty(batches, length, heads, head_dim).transpose(1, 2)
    return x.new_empty(batches, heads, length, head_dim)


class RotaryFunction(torch.autograd.Function):
    """rotary_forward, which is linear in q and k: its backward is the inverse rotation.

    `settings` are the arguments of rotary_forward that are no tensors, in its order.
    """

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor | None,
        positions: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        settings: tuple,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return rotary_forward(q, k, cos, sin, positions, cu_seqlens, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, _, *tables, ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tables)

    @staticmethod
    def backward(
        ctx: Any, dq: torch.Tensor | None, dk: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        offset, q_inside, k_inside, interleaved, inverse, paired = ctx.settings
        tables = ctx.saved_tensors
        # Which of the two has a gradient, and how it shall lie in memory.
        given = [
            (place, gradient, inside)
            for place, gradient, inside in ((0, dq, q_inside), (1, dk, k_inside))
            if gradient is not None and ctx.needs_input_grad[place]
        ]
        result: list[torch.Tensor | None] = [None] * 7
        if given:
            first, second = (*given, (1, None, 0))[:2]
            settings = (offset, first[2], second[2], interleaved, not inverse, paired)
            turned = call(RotaryFunction, first[1], second[1], *tables, settings)
            for (place, _, _), gradient in zip(given, turned, strict=False):
                result[place] = gradient
        return tuple(result)


def _rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor | None, bool],
    interleaved: bool,
    positions: torch.Tensor | int | None,
    cu_seqlens: torch.Tensor | None,
    inverse: bool,
) -> tuple[torch.Tensor, Any]:
    """Run the kernel on (B, H, S, D) or (H, S, D)."""
    unbatched = q.dim() == 3
    tensors = [x[None] if unbatched and x is not None else x for x in (q, k)]
    offset = 0
    if not isinstance(positions, torch.Tensor):
        offset, positions = positions or 0, None
    inside = [int(x is not None and _heads_inside(x)) for x in tensors]
    cos, sin, paired = tables
    settings = (offset, *inside, interleaved, inverse, paired)
    turned = call(RotaryFunction, *tensors, cos, sin, positions, cu_seqlens, settings)
    if unbatched:
        return turned[0][0], None if k is None else turned[1][0]
    return turned


def _heads_inside(x: torch.Tensor) -> bool:
    """Whether (B, H, S, D) lies in memory as (B, S, H, D), as products of linear layers do."""
    return x.stride(1) < x.stride(2)


@operation(
    reference=reference.apply_rotary,
    samples=(
        Sample("smallest", x=(1, 2, 3, 4), **angles(3, 2)),
        Sample("several heads and tokens", x=(2, 3, 17, 16), **angles(20, 8)),
        Sample("more heads and tokens than a tile", x=(1, 11, 70, 64), **angles(70, 32)),
        Sample("interleaved", x=(2, 3, 17, 16), **angles(17, 8), interleaved=True),
        Sample("partial", x=(2, 3, 9, 80), **angles(9, 16)),
        Sample("partial, interleaved", x=(2, 3, 9, 30), **angles(9, 5), interleaved=True),
        Sample("odd head dim", x=(2, 2, 9, 37), **angles(9, 18)),
        Sample("offset", x=(2, 3, 9, 16), **angles(40, 8), positions=31),
        Sample("positions", x=(2, 3, 4, 16), **angles(9, 8), positions=integers(8, 0, 3, 3)),
        Sample("angles by token", x=(2, 3, 9, 16), **angles(2, 9, 8)),
        Sample("angles by token, one batch entry", x=(2, 3, 9, 16), **angles(1, 9, 8)),
        Sample(
            "packed sequences",
            x=(3, 24, 16),
            **angles(40, 8),
            cu_seqlens=integers(0, 5, 5, 6, 24, dtype=torch.int32),
            positions=3,
        ),
        Sample("inverse", x=(2, 3, 9, 16), **angles(9, 8), inverse=True),
        Sample("full width", x=(2, 3, 9, 16), **angles(9, 8, form="halves"), full_width=True),
        Sample(
            "full width, interleaved, by token",
            x=(2, 3, 9, 20),
            **angles(2, 9, 8, form="pairs"),
            interleaved=True,
            full_width=True,
        ),
        Sample("complex", x=(2, 3, 9, 16), **angles(9, 8, form="complex"), interleaved=True),
        Sample("no tokens", x=(2, 3, 0, 16), **angles(9, 8)),
    ),
)
def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    full_width: bool = False,
    positions: torch.Tensor | int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inverse: bool = False,
) -> torch.Tensor:
    """Rotary positions: turn pairs of a head's columns by the angle of each token's position.

    (a, b) becomes (a cos - b sin, b cos + a sin), computed in float32 (float64 for float64).
    Nothing is saved for the backward but the tables.

    Args:
        x: (B, H, S, D) or (H, S, D), float16, bfloat16, float32 or float64. Any strides with a unit
            last one are read in place, so (B, S, H, D) or (S, H, D) storage transposed costs
            nothing, and the result lies in memory as x does; other layouts are copied.
        cos, sin: (positions, R/2), a row for each position, or (B or 1, S, R/2), a row for each
            token; of any float dtype and without a gradient. The first R <= D columns are turned,
            the others copied. Complex numbers cos + i sin come as `cos`, without `sin`.
        interleaved: pairs are columns (2i, 2i + 1), as in GPT-J; otherwise (i, i + R/2), as in
            Llama.
        full_width: cos and sin have R columns, not R/2, with every angle twice, as transformers
            and diffusers hold them: two equal halves or, interleaved, equal pairs. Of two equal
            numbers the second is not used, and nothing is copied. The width of a table alone
            does not say which it is, for R may be less than D.
        positions: an int, the position of the first token; or an int32 or int64 tensor (S,),
            (1, S) or (B, S), each token's own. None is 0.
        cu_seqlens: (sequences + 1,) int32 or int64: x holds several sequences one after another,
            the first from token 0, and each counts its positions from its own start. Tokens past
            the last boundary count from there.
        inverse: turn by the negative angles.

    Returns:
        A tensor shaped like x and of its dtype. Differentiable in x, any number of times.

    Raises:
        TypeError, ValueError: an argument does not fit, or the tables have fewer rows than S and an
            int of `positions` need. What stands in tensors is not looked at, which would mean to
            wait for the device: a token whose position has no row comes out as NaN.

    Source: Su, Lu, Pan, Murtadha, Wen and Liu, "RoFormer: Enhanced Transformer with Rotary Position
    Embedding" (2021).

    Example:
        >>> angles = torch.arange(6)[:, None] * 100.0 ** -torch.linspace(0, 1, 4)
        >>> x = torch.randn(1, 2, 6, 8)
        >>> turned = fastattn.apply_rotary(x, angles.cos(), angles.sin())
        >>> back = fastattn.apply_rotary(turned, angles.cos(), angles.sin(), inverse=True)
        >>> torch.testing.assert_close(back, x)
    """
    positions = whole_number("apply_rotary", "positions", positions)
    check_form("apply_rotary", cos, sin, full_width)
    halves = split_tables(cos, sin, interleaved, full_width)
    check_rotary("apply_rotary", {"x": x}, *halves, positions, cu_seqlens)
    if not use_triton(x):
        return reference.apply_rotary(
            x,
            *halves,
            interleaved=interleaved,
            positions=positions,
            cu_seqlens=cu_seqlens,
            inverse=inverse,
        )
    tables = pair_tables(cos, sin, interleaved, full_width)
    return _rotate(x, None, tables, interleaved, positions, cu_seqlens, inverse)[0]


@operation(
    reference=reference.apply_rotary_qk,
    samples=(
        Sample("smallest", q=(1, 2, 3, 4), k=(1, 1, 3, 4), **angles(3, 2)),
        Sample("grouped heads", q=(2, 4, 17, 16), k=(2, 2, 17, 16), **angles(20, 8)),
        Sample("alike", q=(2, 2, 5, 16), k=(2, 2, 5, 16), **angles(5, 8), interleaved=True),
        Sample(
            "more heads than a program turns",
            q=(2, 19, 20, 48),
            k=(2, 9, 20, 48),
            **angles(20, 16),
            positions=0,
        ),
        Sample(
            "full width, interleaved",
            q=(2, 4, 17, 20),
            k=(2, 2, 17, 20),
            **angles(20, 8, form="pairs"),
            interleaved=True,
            full_width=True,
        ),
        Sample("complex", q=(1, 4, 9, 16), k=(1, 2, 9, 16), **angles(1, 9, 8, form="complex")),
        Sample(
            "packed sequences",
            q=(4, 24, 16),
            k=(2, 24, 16),
            **angles(18, 8),
            cu_seqlens=integers(0, 5, 6, 24),
        ),
    ),
)
def apply_rotary_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    full_width: bool = False,
    positions: torch.Tensor | int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary` of queries and keys, in one launch forward and one backward.

    Args:
        q: (B, H, S, D) or (H, S, D).
        k: (B, Hkv, S, D) or (Hkv, S, D), of q's dtype.
        cos, sin, interleaved, full_width, positions, cu_seqlens, inverse: as in `apply_rotary`.

    Returns:
        The turned q and k, each as `apply_rotary` would give it.

    Raises:
        TypeError, ValueError: as in `apply_rotary`.

    Example:
        >>> cos, sin = torch.ones(6, 4), torch.zeros(6, 4)
        >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
        >>> torch.equal(fastattn.apply_rotary_qk(q, k, cos, sin)[1], k)
        True
    """
    positions = whole_number("apply_rotary_qk", "positions", positions)
    check_form("apply_rotary_qk", cos, sin, full_width)
    halves = split_tables(cos, sin, interleaved, full_width)
    check_rotary("apply_rotary_qk", {"q": q, "k": k}, *halves, positions, cu_seqlens)
    if not use_triton(q):
        return reference.apply_rotary_qk(
            q,
            k,
            *halves,
            interleaved=interleaved,
            positions=positions,
            cu_seqlens=cu_seqlens,
            inverse=inverse,
        )
    tables = pair_tables(cos, sin, interleaved, full_width)
    return _rotate(q, k, tables, interleaved, positions, cu_seqlens, inverse)
