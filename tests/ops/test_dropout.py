"""Dropout's random numbers: the published generator, one mask everywhere, replayed when asked."""

import math
from collections.abc import Callable

import pytest
import torch
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.functional as F
from fastattn import reference
from fastattn.reference.dropout import _philox
from support import DEVICE, WIDEST, assert_close, count_launches, same_bits

# Key, counter and result of Philox 4x32-10, as Random123's authors publish them (kat_vectors).
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000),
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

SEEDS = (0, 1, 2**31 - 1, 2**31, 2**32 + 5, 2**62 - 1)


def seed_tensor(value: int, device: str | None = None) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(key, counter, words):
    def tensors(numbers: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor([number]) for number in numbers)

    found = _philox(tensors(counter), *tensors(key))
    assert [word.item() for word in found] == list(words)


def test_mask_is_made_of_the_words_in_order():
    # Counter (0, 0, 0, 0), key 0: the first four columns of the first row.
    shares = [word / 2**32 for word in KNOWN_ANSWERS[0][2]]
    for p in (0.05, 0.3, 0.5, 0.6, 0.8, 0.95):
        kept = reference.dropout_mask(seed_tensor(0), [1, 4], p)
        assert kept.tolist() == [[share >= p for share in shares]]


@pytest.mark.kernels
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(5,), (3, 1), (3, 7, 18), (70, 33), (2, 2050)], ids=str)
def test_kernels_and_reference_keep_the_same(shape, seed):
    on_device = seed_tensor(seed, DEVICE)
    expected = reference.dropout_mask(seed_tensor(seed), shape, 0.37)
    assert torch.equal(fastattn.dropout_mask(on_device, shape, 0.37).cpu(), expected)
    # Ones come out as zero or as the scale: the output shows the mask that was applied.
    y = fastattn.dropout(torch.ones(shape, device=DEVICE), 0.37, seed=on_device)
    assert torch.equal((y != 0).cpu(), expected)
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(1 / 0.63).item()}


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(3, 7, 18), (2, 2050)], ids=str)
def test_backward_applies_the_mask_of_the_forward(shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    y = fastattn.dropout(x, 0.5)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx * x.detach(), y)
    assert 0 < dx.count_nonzero() < dx.numel()


@pytest.mark.kernels
def test_a_mask_does_not_depend_on_layout_or_dtype():
    seed = seed_tensor(77, DEVICE)
    expected = fastattn.dropout_mask(seed, (6, 40), 0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ones = torch.ones(40, 6, device=DEVICE, dtype=dtype).t()
        assert torch.equal(fastattn.dropout(ones, 0.5, seed=seed) != 0, expected)
        ones = torch.ones(2, 3, 40, device=DEVICE, dtype=dtype)
        y = fastattn.dropout(ones, 0.5, seed=seed)
        assert torch.equal(y.view(6, 40) != 0, expected)


@pytest.mark.kernels
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 1 - 1e-4])
@pytest.mark.slow
def test_share_of_kept_elements(p):
    count = 1 << 16
    kept = fastattn.dropout_mask(seed_tensor(3, DEVICE), (64, count // 64), p)
    deviation = math.sqrt(count * p * (1 - p))
    assert abs(kept.sum().item() - count * (1 - p)) <= 5 * deviation


@pytest.mark.kernels
def test_elements_and_seeds_are_independent():
    # Shares of agreeing neighbours, of rows, columns and seeds, and of the bits of one counter.
    count = 1 << 16
    one = fastattn.dropout_mask(seed_tensor(8, DEVICE), (256, 256), 0.5)
    other = fastattn.dropout_mask(seed_tensor(9, DEVICE), (256, 256), 0.5)
    pairs = {
        "seeds": (one, other),
        "rows": (one[1:], one[:-1]),
        "columns": (one[:, 1:], one[:, :-1]),
        "counters": (one[:, 4:], one[:, :-4]),
    }
    for name, (a, b) in pairs.items():
        agreeing = (a == b).sum().item()
        assert abs(agreeing - a.numel() / 2) <= 5 * math.sqrt(count / 4), name


@pytest.mark.kernels
@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_probabilities_at_the_ends(p):
    # Closer to 0 or 1 than 31 bits can say: everything is kept, or all but next to nothing dropped.
    x = torch.ones(8, 256, device=DEVICE)
    y = fastattn.dropout(x, p, seed=seed_tensor(5, DEVICE))
    assert y.isfinite().all()
    assert y.count_nonzero() == (x.numel() if p < 0.5 else 0)


def generators() -> list:
    return ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]


@pytest.mark.parametrize("device", generators())
def test_manual_seed_reproduces(device):
    x = torch.randn(20, 30, device=device)
    torch.manual_seed(11)
    first, second = fastattn.dropout(x), fastattn.dropout(x)
    torch.manual_seed(11)
    assert same_bits(fastattn.dropout(x), first)
    assert same_bits(fastattn.dropout(x), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("device", generators())
def test_p_of_zero_is_a_copy(device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    y = fastattn.dropout(x, 0.0)
    assert same_bits(y, x)
    assert y.data_ptr() != x.data_ptr()
    (dx,) = torch.autograd.grad(y, x, x.detach())
    assert same_bits(dx, x)


@pytest.mark.parametrize("device", generators())
def test_a_scalar(device):
    x = torch.tensor(2.0, device=device, requires_grad=True)
    outputs = {fastattn.dropout(x, 0.5, seed=seed_tensor(s, device)).item() for s in range(20)}
    assert outputs == {0.0, 4.0}


@pytest.mark.kernels
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.slow
def test_compiled_dropout_draws_what_eager_draws_and_replays_it(compiler):
    torch.compiler.reset()
    compiled = torch.compile(fastattn.dropout, fullgraph=True, backend=compiler)
    x = torch.randn(9, 40, device=DEVICE, requires_grad=True)
    y = compiled(x, 0.5)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx * x.detach(), y)
    assert 0 < dx.count_nonzero() < dx.numel()
    assert not torch.equal(compiled(x, 0.5), y)


@pytest.mark.kernels
@pytest.mark.kernels
@pytest.mark.parametrize("budget", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_seed_that_is_given_is_that_of_what_a_memory_budget_computes_again(budget):
    x, weight = (
        torch.randn(shape, dtype=WIDEST, device=DEVICE, requires_grad=True)
        for shape in ((1, 2, 7, 8), (8, 8))
    )
    seeds = torch.tensor([5], device=DEVICE), torch.tensor([6], device=DEVICE)

    def dropped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = fastattn.dropout(fastattn.linear(x, weight), 0.5, seed=seeds[0]).sin()
        return fastattn.attention(h, h, h, dropout_p=0.5, dropout_seed=seeds[1]).sin()

    def results(function: Callable[..., torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        with count_launches() as launches:
            y = function(x, weight)
            gradients = torch.autograd.grad(y.square().sum(), (x, weight))
        return [y, *gradients], len(launches)

    expected, fewest = results(dropped)
    torch.compiler.reset()
    with functorch_config.patch(activation_memory_budget=budget):
        # The backend that divides a graph as inductor does.
        compiled = torch.compile(dropped, fullgraph=True, backend="aot_eager_decomp_partition")
        found, launches = results(compiled)
    assert launches > fewest, "nothing was computed again"
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_replays_a_drawn_seed(reentrant):
    x = torch.randn(9, 40, device=DEVICE, requires_grad=True)
    y = checkpoint(fastattn.dropout, x, 0.5, use_reentrant=reentrant)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad * x.detach(), y)


@pytest.mark.parametrize("device", generators())
def test_functional_follows_torch(device):
    x = torch.randn(5, 8, device=device, requires_grad=True)
    assert F.dropout(x, 0.5, training=False) is x
    assert F.dropout(x, 0.0) is x

    dropped = F.dropout(x, 1.0)
    assert not dropped.any()
    (dx,) = torch.autograd.grad(dropped.sum(), x)
    assert not dx.any()
    # As in torch, infinities times zero are no number.
    bad = torch.tensor([math.inf, math.nan, 1.0], device=device)
    assert F.dropout(bad, 1.0).isnan().tolist() == (
        torch.nn.functional.dropout(bad, 1.0).isnan().tolist()
    )


@pytest.mark.parametrize("device", generators())
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_functional_in_place(device, p):
    leaf = torch.randn(5, 8, device=device, requires_grad=True)
    x = leaf * 1.0
    before = x.detach().clone()
    torch.manual_seed(2)
    y = F.dropout(x, p, inplace=True)
    assert y is x
    torch.manual_seed(2)
    assert same_bits(y, F.dropout(before, p))
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(gradient * before, y.detach())
