"""Ops but the norms and dropout on two ranks: what stays sharded, and that it is right."""

from collections.abc import Sequence

import pytest
import torch
from comparison import compare_with_one_process
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import fastattn

WHOLE = Replicate()


def normal(*shape: int, count: int = 1) -> list[torch.Tensor]:
    """Leaves with the same numbers on every rank."""
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for _ in range(count)]


def gated_activations(mesh: DeviceMesh) -> None:
    """Separate tensors stay sharded over any dimension, a packed one over all but the last."""
    for op in (fastattn.swiglu, fastattn.geglu, fastattn.reglu, fastattn.glu):
        for dim in range(3):
            placements = [Shard(dim)] * 2
            tensors = normal(4, 6, 20, count=2)
            compare_with_one_process(mesh, op.__name__, op, tensors, placements, Shard(dim))
    for dim in range(2):
        tensors = normal(4, 6, 20)
        compare_with_one_process(mesh, "packed", fastattn.swiglu, tensors, [Shard(dim)], Shard(dim))


def modulated_norms(mesh: DeviceMesh) -> None:
    """Samples stay sharded with their scales and shifts, tokens beside whole ones."""
    for op in (fastattn.modulated_layer_norm, fastattn.modulated_rms_norm):
        for rows, each in ((Shard(0), Shard(0)), (Shard(1), WHOLE), (WHOLE, WHOLE)):
            tensors = [*normal(4, 6, 20), *normal(4, 20, count=2)]
            compare_with_one_process(mesh, op.__name__, op, tensors, [rows, each, each], rows)


def softmaxes(mesh: DeviceMesh) -> None:
    """Rows stay sharded; causal ones over the dimensions before the queries."""

    def causal(x: torch.Tensor) -> torch.Tensor:
        return fastattn.softmax(x, causal=True, scale=0.5)

    cases = ((fastattn.softmax, (0, 1)), (fastattn.log_softmax, (0, 1)), (causal, (0,)))
    for op, dims in cases:
        for dim in dims:
            tensors = normal(4, 6, 20)
            compare_with_one_process(mesh, op.__name__, op, tensors, [Shard(dim)], Shard(dim))


def rotations(mesh: DeviceMesh) -> None:
    """Batch entries and heads stay sharded, and tokens that bring their angles."""
    cases: Sequence[tuple[tuple[int, ...], Placement, Placement]] = (
        ((6, 4), Shard(0), WHOLE),
        ((6, 4), Shard(1), WHOLE),
        ((2, 6, 4), Shard(0), Shard(0)),
        ((2, 6, 4), Shard(2), Shard(1)),
    )
    for shape, heads, table in cases:
        angles = torch.arange(torch.Size(shape).numel()).reshape(shape)
        q, k = normal(2, 4, 6, 8, count=2)
        tables = [angles.cos(), angles.sin()]
        placements = [heads, heads, table, table]
        both, one = [q, k, *tables], [*normal(2, 4, 6, 8), *tables]
        compare_with_one_process(mesh, "qk", fastattn.apply_rotary_qk, both, placements, heads)
        compare_with_one_process(mesh, "x", fastattn.apply_rotary, one, placements[1:], heads)

    def at_positions(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        return fastattn.apply_rotary(x, cos, sin, positions=positions)

    angles = torch.arange(36.0).reshape(9, 4)
    for heads, placement in ((Shard(0), Shard(0)), (Shard(1), WHOLE), (Shard(2), Shard(1))):
        positions = torch.tensor([[1, 8, 2, 7, 3, 6], [0, 1, 2, 3, 4, 5]])
        tensors = [*normal(2, 4, 6, 8), angles.cos(), angles.sin(), positions]
        placements = [heads, WHOLE, WHOLE, placement]
        compare_with_one_process(mesh, "positions", at_positions, tensors, placements, heads)


def cross_entropies(mesh: DeviceMesh) -> None:
    """Rows stay sharded, and losses over all rows are sums over ranks."""
    target = torch.arange(24).reshape(4, 6) * 7 % 20
    target[1, 2] = -100
    weight = torch.linspace(0.5, 2.0, 20)

    def each(
        logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fastattn.cross_entropy(
            logits, target, weight=weight, reduction="none", z_loss=1e-3, return_lse=True
        )

    def mean(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fastattn.cross_entropy(logits, target, weight=weight, label_smoothing=0.1)

    def total(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fastattn.cross_entropy(logits, target, reduction="sum", softcap=2.0)

    for dim in range(2):
        rows = Shard(dim)
        for op, result in ((each, rows), (mean, None), (total, None)):
            tensors = [*normal(4, 6, 20), target, weight]
            placements = [rows, rows, WHOLE]
            compare_with_one_process(mesh, op.__name__, op, tensors, placements, result)


def linear_cross_entropies(mesh: DeviceMesh) -> None:
    """Rows of chunks stay sharded, and the gradients of weight and bias are sums over ranks."""
    target = torch.arange(24).reshape(4, 6) * 7 % 11
    target[1, 2] = -100

    def each(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fastattn.linear_cross_entropy(
            x, weight, target, bias, reduction="none", return_lse=True, chunk_rows=5
        )

    def mean(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        return fastattn.linear_cross_entropy(x, weight, target, bias, chunk_rows=5)

    for dim in range(2):
        rows = Shard(dim)
        for op, result in ((each, rows), (mean, None)):
            tensors = [*normal(4, 6, 8), *normal(11, 8), *normal(11), target]
            placements = [rows, WHOLE, WHOLE, rows]
            compare_with_one_process(mesh, op.__name__, op, tensors, placements, result)


def log_probs(mesh: DeviceMesh) -> None:
    """Rows stay sharded, also those of chunks; a head that is sharded over classes is refused."""
    target = torch.arange(24).reshape(4, 6) * 7 % 11
    target[1, 2] = -100

    def of_logits(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return fastattn.log_prob(logits, target, temperature=0.7, return_entropy=True)

    def of_rows(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return fastattn.linear_log_prob(
            x, weight, target, bias, temperature=0.7, return_entropy=True, chunk_rows=5
        )

    for dim in range(2):
        rows = Shard(dim)
        tensors = [*normal(4, 6, 11), target]
        compare_with_one_process(mesh, "log_prob", of_logits, tensors, [rows, rows], rows)
        tensors = [*normal(4, 6, 8), *normal(11, 8), *normal(11), target]
        placements = [rows, WHOLE, WHOLE, rows]
        compare_with_one_process(mesh, "linear_log_prob", of_rows, tensors, placements, rows)

    mask = target != -100
    teacher = [tensor.detach() for tensor in (*normal(4, 6, 5), *normal(11, 5))]

    def divergence(
        x: torch.Tensor,
        weight: torch.Tensor,
        teacher_x: torch.Tensor,
        teacher_weight: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        return fastattn.linear_jsd(x, weight, teacher_x, teacher_weight, mask, chunk_rows=5)

    for dim in range(2):
        rows = Shard(dim)
        operands = [*normal(4, 6, 8), *normal(11, 8), *teacher, mask]
        placements = [rows, WHOLE, rows, WHOLE, rows]
        compare_with_one_process(mesh, "linear_jsd", divergence, operands, placements, rows)

    ids = torch.arange(4 * 6 * 3).view(4, 6, 3) % 11
    kept = [ids, normal(4, 6, 3)[0].detach() - 2.0, mask]

    def divergence_of_few(
        x: torch.Tensor, weight: torch.Tensor, *teacher: torch.Tensor
    ) -> torch.Tensor:
        return fastattn.linear_top_k_kl(x, weight, *teacher, chunk_rows=5)

    for dim in range(2):
        rows = Shard(dim)
        operands = [*normal(4, 6, 8), *normal(11, 8), *kept]
        placements = [rows, WHOLE, rows, rows, rows]
        compare_with_one_process(
            mesh, "linear_top_k_kl", divergence_of_few, operands, placements, rows
        )

    x, weight, target = (
        distribute_tensor(tensor.detach(), mesh, [placement])
        for tensor, placement in ((tensors[0], WHOLE), (tensors[1], Shard(0)), (target, WHOLE))
    )
    with pytest.raises(ValueError, match="weight is sharded over its classes"):
        fastattn.linear_log_prob(x, weight, target)


def contrastive(mesh: DeviceMesh) -> None:
    """Rows of all ranks are candidates: losses and gradients add up to those of one process."""
    x, y = normal(6, 4, count=2)
    fastattn.losses.info_nce(x, y, 3.0).backward()
    rank, group = mesh.get_rank(), mesh.get_group()
    mine = slice(3 * rank, 3 * rank + 3)
    own = [tensor.detach()[mine].requires_grad_() for tensor in (x, y)]
    loss = fastattn.losses.info_nce(*own, 3.0, group=group)
    loss.backward()
    for part, whole in zip(own, (x, y), strict=True):
        # A mean over half as many rows weighs each of them twice.
        assert part.grad is not None
        assert whole.grad is not None
        torch.testing.assert_close(part.grad, 2.0 * whole.grad[mine])


def attentions(mesh: DeviceMesh) -> None:
    """Batch elements and heads stay sharded, and each rank takes its part of masks and the like."""
    mask = torch.arange(2 * 6 * 10).reshape(2, 1, 6, 10) % 5 < 3
    bias = torch.linspace(-2.0, 2.0, 4 * 6 * 10).reshape(1, 4, 6, 10)
    lengths = torch.tensor([7, 10])

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, v, causal=True, window=3)

    def everything(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fastattn.attention(
            q,
            k,
            v,
            mask=mask,
            kv_lengths=lengths,
            alibi_slopes=fastattn.alibi_slopes(4),
            softcap=2.0,
            return_lse=True,
        )

    def with_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastattn.functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)

    def tensors(key_heads: int) -> list[torch.Tensor]:
        keys = normal(2, key_heads, 10, 8, count=2)
        return [*normal(2, 4, 6, 8), *keys]

    for op in (plain, everything, with_bias):
        for dim in range(2):
            placements = [Shard(dim)] * 3
            compare_with_one_process(mesh, op.__name__, op, tensors(2), placements, Shard(dim))

    def with_distributed_terms(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        return fastattn.attention(q, k, v, mask=mask, kv_lengths=lengths)

    def learned(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor,
        slopes: torch.Tensor,
        sinks: torch.Tensor,
        table: torch.Tensor,
    ) -> torch.Tensor:
        relative_bias = fastattn.RelativeBias(table, max_distance=8)
        return fastattn.attention(
            q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, relative_bias=relative_bias
        )

    # By batch elements, beside parameters that all ranks have; and by heads, as those are.
    for dim, others in ((0, [WHOLE] * 4), (1, [Shard(1), Shard(0), Shard(0), Shard(1)])):
        own = [*tensors(2), *normal(1, 4, 6, 10), *normal(4, count=2), *normal(4, 4)]
        placements = [*[Shard(dim)] * 3, *others]
        compare_with_one_process(mesh, "learned", learned, own, placements, Shard(dim))

    own = [*tensors(2), mask, lengths]
    rows = [Shard(0)] * 5
    compare_with_one_process(mesh, "DTensors", with_distributed_terms, own, rows, Shard(0))
    # Ranks that would get no whole groups of heads, or parts of a sequence, gather.
    for dim in (1, 2):
        placements = [Shard(dim), Shard(2), Shard(2)]
        compare_with_one_process(mesh, "gathered", plain, tensors(1), placements, None)

    cumulative = torch.tensor([0, 3, 8], dtype=torch.int32)

    def packed(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return fastattn.attention_varlen(
            q, k, v, cumulative, cumulative, 5, 5, causal=True, bias=bias
        )

    own = [*normal(8, 4, 8), *normal(8, 2, 8, count=2), *normal(1, 4, 5, 5)]
    placements = [Shard(1)] * 4
    compare_with_one_process(mesh, "packed", packed, own, placements, Shard(1))
