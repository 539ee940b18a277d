"""DTensor: how ops tell it what may be sharded, rules that several ops share, and helpers.

A rule is `kernel_op(..., sharding=rule)`: the op's arguments, with DTensors among them, to a list
of pairs (placements of the outputs, placements of the arguments), each of which is a way to run the
op on every rank's own shards. DTensor takes the one to which moving the arguments costs least. An
op without a rule takes no DTensor, and says so.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

Sharding = Callable[..., list[tuple[list[Any], list[Any]]]]
"""A rule: arguments to pairs of (output placements, argument placements)."""


def check_order(declaration: Callable) -> None:
    """Dtypes and integers must come before bools, strings and lists, in an op with a rule.

    DTensor remembers what an op's outputs look like by its tensors and, of the other arguments, by
    those from the first dtype or integer on. An earlier one would have no say in it. That is why
    some bools that decide about outputs are declared as int.

    Raises:
        TypeError: they do not.
    """
    parameters = inspect.signature(declaration).parameters.values()
    heard = False
    for kind in [parameter.annotation for parameter in parameters]:
        heard = heard or kind in (int, torch.dtype, int | None, torch.dtype | None)
        if not heard and kind in (bool, str, list[int]):
            raise TypeError(f"{declaration.__name__}: dtypes and integers must come before {kind}")


def tell_dtensor(op: Any, rule: Sharding) -> None:
    """Register a rule with DTensor, which importing takes most of a second."""
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(op)(rule)


def is_distributed(arg: Any) -> bool:
    """Whether an argument is a DTensor; asking does not import DTensor, which takes long."""
    return type(arg).__name__ == "DTensor"


def refuse_distributed(op: str, **tensors: Any) -> None:
    """No DTensor is among the tensors, of an op without a rule.

    `kernel_op` calls it for launchers. Ops whose reference takes none either call it themselves.

    Raises:
        TypeError: there is one; the message names it.
    """
    for name, tensor in tensors.items():
        if is_distributed(tensor):
            raise TypeError(
                f"{op}: {name} is a DTensor, which is not supported here: call it on local tensors"
            )


def replicate(local: torch.Tensor, like: Any) -> Any:
    """`local`, which every rank has, as a DTensor on the mesh of the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)


def take_from_first_rank(local: torch.Tensor, like: Any) -> None:
    """Overwrite `local` by that of the first rank on the mesh of the DTensor `like`."""
    for group in like.device_mesh.get_all_groups():
        torch.distributed.broadcast(local, group=group, group_src=0)


def rowwise(
    rows_in: Sequence[int], rows_out: Sequence[int], summed_out: Sequence[int] = ()
) -> Sharding:
    """The rule of an op that works on each row of the last dimension by itself.

    Whatever leading dimension the rows are sharded over, they stay sharded; parameters are
    replicated; what is summed over rows comes out as partial sums.

    Args:
        rows_in: places of the arguments that are made of rows, the first of which is never None.
        rows_out: places of the outputs that are made of rows.
        summed_out: places of the outputs that are sums over rows. The op has no others.
    """

    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        def acceptable(row_placement: Any, sum_placement: Any) -> tuple[list[Any], list[Any]]:
            outputs: list[Any] = [None] * (len(rows_out) + len(summed_out))
            for place in rows_out:
                outputs[place] = row_placement
            for place in summed_out:
                outputs[place] = sum_placement
            inputs = [
                None
                if not _is_tensor_like(arg)
                else row_placement
                if place in rows_in
                else Replicate()
                for place, arg in enumerate(args)
            ]
            return outputs, inputs

        leading = len(args[rows_in[0]].shape) - 1
        return [
            acceptable(Replicate(), Replicate()),
            *(acceptable(Shard(dim), Partial()) for dim in range(leading)),
        ]

    return rule


def elementwise(inputs: Sequence[int], outputs: Sequence[int]) -> Sharding:
    """The rule of an op that works on each element by itself, of tensors of one shape.

    Every dimension stays sharded. Where one of the inputs is absent, another holds two in its last
    dimension, which then is taken as a row.

    Args:
        inputs: places of the tensors among the arguments, the first of which is never None. The op
            has no others.
        outputs: places of the outputs. The op has no others.
    """
    by_rows = rowwise(rows_in=inputs, rows_out=outputs)

    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Shard

        acceptable = by_rows(*args)
        if all(args[place] is not None for place in inputs):
            last = Shard(len(args[inputs[0]].shape) - 1)
            placed = [last if place in inputs else None for place in range(len(args))]
            acceptable.append(([last] * len(outputs), placed))
        return acceptable

    return rule


def _is_tensor_like(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) or hasattr(arg, "placements")
