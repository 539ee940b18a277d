"""The block sizes of attention on each kind of device: rules, so no device is needed."""

import dataclasses
import itertools

import pytest
import torch

import fastattn
from fastattn.kernels.attention import backward_keys
from fastattn.kernels.attention import config as rules
from fastattn.kernels.attention.composition import compose
from fastattn.kernels.attention.config import (
    attention_forward_config,
    attention_keys_backward_config,
    attention_queries_backward_config,
    head_chunks,
)
from fastattn.kernels.attention.tables import TERM_CLASSES, TILES
from fastattn.kernels.config import INTERPRETER, Target
from fastattn.kernels.tuning import forget_tables
from support import DEVICE, same_bits

TARGETS = (
    INTERPRETER,
    Target("cuda", 80, 32, multiprocessors=108, shared_memory=166912),
    Target("cuda", 86, 32, multiprocessors=28, shared_memory=101376),
    Target("cuda", 89, 32, multiprocessors=128, shared_memory=101376),
    Target("cuda", 90, 32, multiprocessors=132, shared_memory=232448),
    Target("cuda", 100, 32, multiprocessors=148, shared_memory=232448),
    Target("cuda", 120, 32, multiprocessors=188, shared_memory=101376),
    Target("hip", "gfx942", 64, multiprocessors=304, shared_memory=65536),
    Target("hip", "gfx1100", 32, multiprocessors=96, shared_memory=65536),
)

every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))

RULES = {
    "forward": attention_forward_config,
    "keys": attention_keys_backward_config,
    "queries": attention_queries_backward_config,
}

# Of models, and around the widths at which tiles change.
WIDTHS = (1, 16, 32, 63, 64, 65, 80, 96, 112, 128, 129, 160, 192, 256, 257, 512)
HEADS = (*((width, width) for width in WIDTHS), (192, 128), (64, 256), (576, 512))

OPERANDS = (
    (torch.bfloat16, "ieee"),
    (torch.float16, "tf32"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
)

CASES = tuple(
    (*heads, *operands, term_class)
    for heads, operands, term_class in itertools.product(HEADS, OPERANDS, TERM_CLASSES)
)


def padded(*dims: int) -> int:
    """The columns that heads take in a tile."""
    return sum(sum(head_chunks(dim)) for dim in dims)


def is_block(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


@every_target
@pytest.mark.parametrize("kernel", RULES)
def test_tiles_are_what_products_take(kernel, target):
    for case in CASES:
        config = RULES[kernel](*case, target)
        assert is_block(config.block_m), (case, config)
        assert is_block(config.block_n), (case, config)
        assert config.num_warps in (4, 8, 16), (case, config)
        assert config.num_stages >= 1, (case, config)


@every_target
@pytest.mark.parametrize("kernel", RULES)
def test_tiles_fit_into_shared_memory(kernel, target):
    """The least that a kernel needs: what the compiler adds shows only in the compiled code."""
    for case in CASES:
        key_dim, value_dim, dtype, *_ = case
        config = RULES[kernel](*case, target)
        passing, staying = config.block_n, config.block_m
        if kernel == "keys":
            passing, staying = staying, passing
        passing *= config.num_stages * padded(key_dim, value_dim) * dtype.itemsize
        staying *= padded(*((key_dim,) if kernel == "forward" else (key_dim, value_dim)))
        staying *= dtype.itemsize
        if target.backend == "cuda" and 90 <= int(target.arch) < 120:
            # These multiply out of shared memory what others hold in registers.
            needed = passing + staying
        elif target.backend == "hip" and config.num_stages == 1:
            # There one tile after the other takes the same place.
            needed = max(passing, staying) * max(key_dim, value_dim) / (key_dim + value_dim)
        else:
            needed = max(passing, staying)
        assert needed <= target.shared_memory, (case, config)


@pytest.mark.parametrize("target", TARGETS[1:], ids=lambda target: str(target.arch))
def test_sums_fit_into_registers(target):
    """Sums in float32 and a tile of scores, beside which a thread has addresses and operands."""
    most = 192 if target.warp_size == 32 else 320
    for case in CASES:
        key_dim, value_dim, *_ = case
        forward, keys, queries = (rule(*case, target) for rule in RULES.values())
        for config, sums in (
            (forward, forward.block_m * padded(value_dim)),
            (keys, keys.block_n * padded(key_dim, value_dim)),
            (queries, queries.block_m * padded(key_dim)),
        ):
            threads = config.num_warps * target.warp_size
            assert sums + config.block_m * config.block_n <= most * threads, (case, config)


@every_target
def test_sixteen_bits_share_their_tiles(target):
    for rule in RULES.values():
        assert rule(128, 128, torch.bfloat16, "ieee", "plain", target) is rule(
            128, 128, torch.float16, "tf32", "plain", target
        )


@every_target
def test_loaded_masks_leave_one_loop(target):
    """Two loops share the registers that one has, and a mask that is loaded has but one anyway."""
    for case in CASES:
        config = attention_keys_backward_config(*case, target)
        wide = sum(case[:2]) > 256
        if target.backend != "interpreter" and (case[-1] == "tensor" or wide):
            assert config.one_loop, case
        assert not attention_forward_config(*case, target).one_loop, case


def test_kernels_have_tiles_for_the_same_devices():
    devices, *others = (set(tables) for tables in TILES.values())
    assert all(other == devices for other in others)


def test_heads_that_are_too_wide():
    hopper = TARGETS[4]
    with pytest.raises(ValueError, match="at most 1024 columns, not of 1025"):
        attention_forward_config(1025, 64, torch.bfloat16, "ieee", "plain", hopper)


@pytest.mark.parametrize(
    ("terms", "term_class"),
    [
        ("", "plain"),
        ("causal:0:0:0", "plain"),
        ("causal from first:0:0:0", "plain"),
        ("right:0:0:1;left:0:0:1", "index"),
        ("key lengths:1:0:0", "index"),
        ("softcap:0:1:0;causal:0:0:0", "index"),
        ("alibi:1:0:2", "index"),
        ("boolean mask:1:0:4", "tensor"),
        ("causal:0:0:0;boolean mask of rows:1:0:4", "tensor"),
        ("additive bias:1:0:4", "tensor"),
    ],
)
def test_classes_of_terms(terms, term_class):
    assert compose(terms).term_class == term_class


@pytest.mark.kernels
@pytest.mark.parametrize("terms", ["none", "causal", "softcap", "key lengths"])
def test_one_loop_or_two_give_the_same_gradients(monkeypatch, terms):
    """Which of them a configuration has is a matter of registers."""
    rule = backward_keys.attention_keys_backward_config
    q, k, v = (torch.randn(1, 2, 100, 32, device=DEVICE, requires_grad=True) for _ in range(3))
    gradients = []
    for one_loop in (False, True):
        monkeypatch.setattr(
            backward_keys,
            "attention_keys_backward_config",
            lambda *features, one_loop=one_loop: dataclasses.replace(
                rule(*features), one_loop=one_loop
            ),
        )
        o = fastattn.attention(
            q,
            k,
            v,
            causal=terms == "causal",
            softcap=5.0 if terms == "softcap" else None,
            kv_lengths=torch.tensor([75], device=DEVICE) if terms == "key lengths" else None,
        )
        gradients.append(torch.autograd.grad(o.square().sum(), (k, v)))
    for two, one in zip(*gradients, strict=True):
        assert two.abs().max() > 0.01
        torch.testing.assert_close(one, two)


@pytest.mark.kernels
def test_tiles_loaded_again_give_the_same_gradients(monkeypatch):
    q, k, v = (torch.randn(1, 2, 60, 40, device=DEVICE, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 60, 60, device=DEVICE, requires_grad=True)
    gradients = []
    for reloads in (False, True):
        changed = {
            kernel: dataclasses.replace(config, reloads=reloads)
            for kernel, config in rules.INTERPRETED.items()
        }
        monkeypatch.setattr(rules, "INTERPRETED", changed)
        forget_tables()
        o = fastattn.attention(q, k, v, bias=bias, window=(20, 9))
        gradients.append(torch.autograd.grad(o.square().sum(), (q, k, v, bias)))
    monkeypatch.undo()
    forget_tables()
    for held, again in zip(*gradients, strict=True):
        assert same_bits(held, again)


def test_wide_tiles_are_loaded_again_on_rdna():
    *_, rdna = TARGETS
    for rule in (attention_keys_backward_config, attention_queries_backward_config):
        assert rule(128, 128, torch.bfloat16, "ieee", "plain", rdna).reloads
        assert not rule(64, 64, torch.bfloat16, "ieee", "plain", rdna).reloads
        assert not rule(128, 128, torch.bfloat16, "ieee", "plain", TARGETS[4]).reloads
