"""What tests of attention share: its features by name, and the comparison with the reference."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import fastattn
from fastattn import BlockMask, RelativeBias, ScoreTerm
from support import DEVICE, WIDEST, assert_close

Results = dict[str, torch.Tensor]
Options = dict[str, Any]


def normal(*shape: int, dtype: torch.dtype = WIDEST) -> torch.Tensor:
    """A leaf of random numbers."""
    return torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()


def qkv(
    batch: int = 1,
    heads: int = 2,
    queries: int = 40,
    keys: int | None = None,
    dim: int = 16,
    *,
    key_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = WIDEST,
) -> list[torch.Tensor]:
    """q, k and v; unless said otherwise as many keys as queries, and so on."""
    keys = queries if keys is None else keys
    key_heads = heads if key_heads is None else key_heads
    return [
        normal(batch, heads, queries, dim, dtype=dtype),
        normal(batch, key_heads, keys, dim, dtype=dtype),
        normal(batch, key_heads, keys, dim if value_dim is None else value_dim, dtype=dtype),
    ]


def random_mask(*shape: int) -> torch.Tensor:
    """A mask that keeps three scores of five."""
    return torch.rand(shape, device=DEVICE) < 0.6


def incoming(output: torch.Tensor) -> torch.Tensor:
    """A gradient that no symmetry hides."""
    numbers = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype, device=output.device)
    return numbers.reshape(output.shape)


def learned(options: Options) -> Results:
    """What among the options gets a gradient, by name."""
    found: Results = {}
    for name, value in options.items():
        terms = value if name == "score_mods" else [value]
        for place, term in enumerate(terms):
            tensor = term.tensors[0] if isinstance(term, ScoreTerm) and term.learned else term
            # Of its own that has a view, made anew for each call.
            tensor = term.table if isinstance(term, RelativeBias) else tensor
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                found[f"{name} {place}" if len(terms) > 1 else name] = tensor
    return found


def results(function: Callable, tensors: Sequence[torch.Tensor], **options: Any) -> Results:
    """Outputs and gradients of attention by name."""
    outputs = function(*tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    variables = {**dict(zip(("q", "k", "v"), tensors, strict=False)), **learned(options)}
    gradients = torch.autograd.grad(
        outputs, tuple(variables.values()), [incoming(o) for o in outputs]
    )
    named = zip((f"d{name}" for name in variables), gradients, strict=True)
    return {**dict(zip(("o", "lse"), outputs, strict=False)), **dict(named)}


def second_derivatives(
    function: Callable, tensors: Sequence[torch.Tensor], **options: Any
) -> Results:
    """Derivatives of a sum of the gradients, with respect to all that these depend on, by name."""
    outputs = function(*tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [incoming(output).requires_grad_() for output in outputs]
    variables = {**dict(zip(("q", "k", "v"), tensors, strict=False)), **learned(options)}
    gradients = torch.autograd.grad(outputs, tuple(variables.values()), given, create_graph=True)
    total: Any = sum((gradient * incoming(gradient)).sum() for gradient in gradients)
    variables |= dict(zip(("do", "dlse"), given, strict=False))
    found = torch.autograd.grad(total, tuple(variables.values()), materialize_grads=True)
    return dict(zip(variables, found, strict=True))


def assert_results_close(found: Results, expected: Results) -> None:
    """Agreement in `WIDEST`; infinities, which an lse may have, in the same places."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        infinite = value.isinf()
        assert torch.equal(found[name][infinite], value[infinite]), name
        assert_close(found[name].masked_fill(infinite, 0), value.masked_fill(infinite, 0), name)


def check(
    tensors: Sequence[torch.Tensor], function: Callable = fastattn.attention, **options: Any
) -> None:
    """Outputs and gradients are the reference's, the lse and its gradient included."""
    options.setdefault("return_lse", True)
    found = results(function, tensors, **options)
    with fastattn.backend("reference"):
        expected = results(function, tensors, **options)
    assert_results_close(found, expected)


def slopes(*shape: int) -> torch.Tensor:
    """ALiBi's slopes for the last dimension, a little different for each batch element."""
    per_head = fastattn.alibi_slopes(shape[-1]).to(DEVICE)
    batch = torch.linspace(1.0, 2.0, shape[0], device=DEVICE)[:, None]
    return per_head * batch if len(shape) == 2 else per_head


def ids(batch: int, length: int) -> torch.Tensor:
    """Documents of nine tokens."""
    return (torch.arange(length, device=DEVICE) // 9).expand(batch, length)


def seed(value: int) -> torch.Tensor:
    """A seed of dropout."""
    return torch.tensor([value], device=DEVICE)


def random_blocks(
    batch: int, heads: int, queries: int, keys: int, block_size: tuple[int, int]
) -> BlockMask:
    """A mask of blocks of which three of five count."""
    rows, columns = (
        -(-size // block) for size, block in zip((queries, keys), block_size, strict=True)
    )
    return BlockMask(random_mask(batch, heads, rows, columns), block_size)


FEATURES: dict[str, Callable[[int, int, int, int], Options]] = {
    "causal": lambda b, h, m, n: {"causal": True},
    "window": lambda b, h, m, n: {"window": 13},
    "window to the right": lambda b, h, m, n: {"window": (None, 5)},
    "window to both sides": lambda b, h, m, n: {"window": (20, 7)},
    "softcap": lambda b, h, m, n: {"softcap": 0.7},
    "ALiBi": lambda b, h, m, n: {"alibi_slopes": slopes(h)},
    "ALiBi of each batch element": lambda b, h, m, n: {"alibi_slopes": slopes(b, h)},
    "mask": lambda b, h, m, n: {"mask": random_mask(b, h, m, n)},
    "mask of two dimensions": lambda b, h, m, n: {"mask": random_mask(m, n)},
    "mask of keys": lambda b, h, m, n: {"mask": random_mask(b, 1, 1, n)},
    "mask of queries": lambda b, h, m, n: {"mask": random_mask(1, h, m, 1)},
    "key lengths": lambda b, h, m, n: {
        "kv_lengths": torch.tensor([n // 2, 0, n, n - 1][:b], device=DEVICE)
    },
    "scale": lambda b, h, m, n: {"scale": -0.3},
    "bias": lambda b, h, m, n: {"bias": normal(b, h, m, n)},
    "bias of heads": lambda b, h, m, n: {"bias": normal(h, m, n)},
    "bias of batch elements": lambda b, h, m, n: {"bias": normal(b, 1, m, n)},
    "bias of queries and keys": lambda b, h, m, n: {"bias": normal(m, n)},
    "bias of keys": lambda b, h, m, n: {"bias": normal(b, 1, 1, n)},
    "bias of queries": lambda b, h, m, n: {"bias": normal(1, h, m, 1)},
    "bias of pairs": lambda b, h, m, n: {"bias": normal(b, h, 1, 1)},
    "learned ALiBi": lambda b, h, m, n: {"alibi_slopes": slopes(h).to(WIDEST).requires_grad_()},
    "learned ALiBi of each batch element": lambda b, h, m, n: {"alibi_slopes": normal(b, h)},
    "relative bias": lambda b, h, m, n: {
        "relative_bias": RelativeBias(normal(8, h), max_distance=20)
    },
    "relative bias to the left": lambda b, h, m, n: {
        "relative_bias": RelativeBias(normal(7, h), bidirectional=False, max_distance=20)
    },
    "sinks": lambda b, h, m, n: {"sinks": normal(h)},
    "dropout": lambda b, h, m, n: {"dropout_p": 0.3, "dropout_seed": seed(5)},
    "documents": lambda b, h, m, n: {"document_ids": (ids(1, m), ids(b, n))},
    "documents in any order": lambda b, h, m, n: {
        "document_ids": (
            torch.randint(3, (b, m), device=DEVICE),
            torch.randint(3, (1, n), device=DEVICE),
        )
    },
    "block mask": lambda b, h, m, n: {"block_mask": random_blocks(b, h, m, n, (16, 16))},
    "block mask for all": lambda b, h, m, n: {"block_mask": random_blocks(1, 1, m, n, (32, 16))},
    "block mask of heads": lambda b, h, m, n: {"block_mask": random_blocks(1, h, m, n, (48, 32))},
}
"""Options by what they mean, for batch elements, heads, queries and keys of these numbers."""

SHAPES: dict[str, Options] = {
    "four heads share keys": {"heads": 4, "key_heads": 1},
    "heads share keys by two": {"heads": 4, "key_heads": 2},
    "wider values": {"dim": 16, "value_dim": 24},
    "fewer queries": {"queries": 21, "keys": 56},
    "more queries": {"queries": 56, "keys": 21},
}
"""Arguments of `qkv` by what they mean."""


def combined(names: Iterable[str], **shape: int) -> tuple[list[torch.Tensor], Options]:
    """q, k, v and options with these features and shapes; of two that exclude each other, one."""
    names = list(names)
    for name in names:
        shape.update(SHAPES.get(name, {}))
    tensors = qkv(**{"batch": 2, "queries": 40, "dim": 8, **shape})  # type: ignore[arg-type]
    sizes = (*tensors[0].shape[:3], tensors[1].shape[2])
    options: Options = {}
    for name in names:
        if name in FEATURES:
            options.update(FEATURES[name](*sizes))
    return tensors, options
