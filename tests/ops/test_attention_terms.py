"""Score terms and masks of one's own, and which blocks attention computes and masks."""

from typing import Any

import pytest
import torch
from attention_support import Results, check, qkv, random_mask, results

import fastattn
from fastattn import MaskTerm, ScoreTerm
from fastattn.ops.backends import HAS_TRITON, INTERPRETED
from support import DEVICE, assert_close, same_bits

kernels = pytest.mark.kernels

if HAS_TRITON:
    import triton
    import triton.language as tl

    from fastattn.kernels.attention_config import INTERPRETED as CONFIGS
    from fastattn.kernels.attention_scores import LOG2E, MaskFunctions, ScoreFunctions

    @triton.jit
    def slope_score(score, m, n, place, args):
        slope = tl.load(args[0] + place[1]).to(score.dtype)
        return score - slope * args[1] * tl.abs(m + place[3] - place[2] - n)

    @triton.jit
    def same(dscore, score, m, n, place, args):
        return dscore

    @triton.jit
    def squashed_score(score, m, n, place, args):
        e = tl.exp2(score * (2.0 * LOG2E / args[0]))
        return args[0] - 2.0 * args[0] / (e + 1.0)

    @triton.jit
    def squashed_backward(dscore, score, m, n, place, args):
        e = tl.exp2(tl.abs(score) * (-2.0 * LOG2E / args[0]))
        return dscore * (4.0 * e / ((1.0 + e) * (1.0 + e)))

    @triton.jit
    def square_score(score, m, n, place, args):
        return score * score * args[0]

    @triton.jit
    def square_backward(dscore, score, m, n, place, args):
        return 2.0 * dscore * score * args[0]

    @triton.jit
    def band_keep(m, n, place, args):
        at = m + place[3] - place[2]
        return (n >= at - args[0]) & (n <= at + args[1])

    @triton.jit
    def band_key_range(first, last, place, args):
        shift = place[3] - place[2]
        return (
            first + shift - args[0],
            last + shift + args[1] + 1,
            last + shift - args[0],
            first + shift + args[1] + 1,
        )

    @triton.jit
    def band_query_range(first, last, place, args):
        shift = place[3] - place[2]
        return (
            first - shift - args[1],
            last - shift + args[0] + 1,
            last - shift - args[1],
            first - shift + args[0] + 1,
        )

    @triton.jit
    def chosen_keep(m, n, place, args):
        row = args[0] + place[0] * args[1]
        return tl.load(row + n, n < place[3], other=0) != 0


class Slope(ScoreTerm):
    """ALiBi, with a tensor (1, H) and a float."""

    def __init__(self, slopes: torch.Tensor, factor: float) -> None:
        self.tensors = (slopes[None],)
        self.floats = (factor,)

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(slope_score, same)

    def score(self, score: torch.Tensor, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        slopes = self.tensors[0][..., None, None].to(score.dtype)
        return score - slopes * self.floats[0] * (m + keys - queries - n).abs()


class Squashed(ScoreTerm):
    """A softcap."""

    def __init__(self, cap: float) -> None:
        self.floats = (cap,)

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(squashed_score, squashed_backward)

    def score(self, score: torch.Tensor, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        return self.floats[0] * torch.tanh(score / self.floats[0])


class Square(ScoreTerm):
    """What the library has not: the square of the score, times a float."""

    floats = (0.5,)

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(square_score, square_backward)

    def score(self, score: torch.Tensor, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        return score.square() * self.floats[0]


class Scattered(MaskTerm):
    """A window to both sides that says nothing of ranges, by integers."""

    def __init__(self, left: int, right: int) -> None:
        self.integers = (left, right)

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(band_keep)

    def keep(self, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        at = m + keys - queries
        left, right = self.integers
        return (n >= at - left) & (n <= at + right)


class Band(Scattered):
    """The same with its ranges."""

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(
            band_keep,
            band_key_range,
            band_query_range,
            hides_first_keys=True,
            hides_last_keys=True,
        )


class Chosen(MaskTerm):
    """Keys by a table (B, N) of bytes."""

    def __init__(self, table: torch.Tensor) -> None:
        self.tensors = (table[:, None],)
        self.integers = (table.stride(0),)

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(chosen_keep)

    def keep(self, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        return self.tensors[0][:, :, None] != 0


def pairs_of_terms() -> dict[str, tuple[Any, Any]]:
    """For B 2, H 2 and N 90: options of the library, and terms of one's own that mean the same."""
    slopes, table = torch.tensor([0.5, 0.1], device=DEVICE), random_mask(2, 90)
    own_table = table.to(torch.uint8)
    return {
        "tensor and float": ({"alibi_slopes": slopes}, [Slope(slopes / 2, 2.0)]),
        "float": ({"softcap": 0.75}, [Squashed(0.75)]),
        "in order": (
            {"softcap": 0.75, "alibi_slopes": slopes},
            [Squashed(0.75), Slope(slopes, 1.0)],
        ),
        "mask with ranges": ({"window": (20, 7)}, [Band(20, 7)]),
        "mask without ranges": ({"window": (20, 7)}, [Scattered(20, 7)]),
        "mask by a tensor": ({"mask": table[:, None, None]}, [Chosen(own_table)]),
        "everything": (
            {
                "softcap": 0.75,
                "alibi_slopes": slopes,
                "window": (20, 7),
                "mask": table[:, None, None],
            },
            [Chosen(own_table), Squashed(0.75), Band(20, 7), Slope(slopes, 1.0)],
        ),
    }


@kernels
@pytest.mark.parametrize("name", pairs_of_terms())
def test_terms_of_ones_own_do_what_the_librarys_do(name):
    options, own = pairs_of_terms()[name]
    tensors = qkv(2, 2, 40, 90, 8, key_heads=1)
    found = results(fastattn.attention, tensors, score_mods=own, return_lse=True)
    expected = results(fastattn.attention, tensors, **options, return_lse=True)
    assert torch.equal(found["lse"].isinf(), expected["lse"].isinf())
    for part, value in expected.items():
        assert_close(found[part].nan_to_num(neginf=0.0), value.nan_to_num(neginf=0.0), part)
    check(tensors, score_mods=own)


@kernels
def test_terms_of_ones_own_beside_the_librarys():
    check(
        qkv(2, 2, 70, 90, 8, key_heads=1),
        score_mods=[Square(), Band(50, 3)],
        softcap=2.0,
        causal=True,
        mask=random_mask(2, 1, 70, 90),
    )


@kernels
def test_terms_of_ones_own_in_packed_sequences():
    cumulative = torch.tensor([0, 40, 40, 75], dtype=torch.int32, device=DEVICE)
    tensors = [x.detach()[0].transpose(0, 1).requires_grad_() for x in qkv(1, 2, 75, 75, 8, key_heads=1)]
    packed = (cumulative, cumulative, 40, 40)

    def attention(*tensors: torch.Tensor, **options: Any) -> Any:
        return fastattn.attention_varlen(*tensors, *packed, **options)

    check(tensors, attention, score_mods=[Square(), Band(20, 3)])


@kernels
def test_derivatives_of_gradients_go_through_terms_of_ones_own():
    tensors = qkv(1, 2, 3, 5, 4)

    def attention(*tensors: torch.Tensor) -> Any:
        return fastattn.attention(*tensors, score_mods=[Square(), Band(2, 1)], return_lse=True)

    torch.autograd.gradcheck(attention, tensors, fast_mode=True)
    torch.autograd.gradgradcheck(attention, tensors, fast_mode=True)


@kernels
@pytest.mark.slow
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_terms_of_ones_own_compile(needs_gradient):
    torch.compiler.reset()
    tensors = [x.requires_grad_(needs_gradient) for x in qkv(1, 2, 40)]
    table = random_mask(1, 40).to(torch.uint8)

    def attention(*tensors: torch.Tensor, table: torch.Tensor, reach: int) -> torch.Tensor:
        mods = [Square(), Band(reach, 3), Chosen(table)]
        return fastattn.attention(*tensors, score_mods=mods)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for reach in (20, 9):
        expected = attention(*tensors, table=table, reach=reach)
        assert same_bits(compiled(*tensors, table=table, reach=reach), expected)


@kernels
def test_a_class_of_the_same_name_has_its_own_functions():
    def define(function: Any, backward: Any) -> ScoreTerm:
        class Again(ScoreTerm):
            floats = (0.75,)

            @classmethod
            def triton_functions(cls) -> Any:
                return ScoreFunctions(function, backward)

        return Again()

    tensors = qkv()
    first = fastattn.attention(*tensors, score_mods=[define(squashed_score, squashed_backward)])
    second = fastattn.attention(*tensors, score_mods=[define(square_score, square_backward)])
    assert same_bits(first, fastattn.attention(*tensors, score_mods=[Squashed(0.75)]))
    assert not torch.allclose(first, second)


class Silent(ScoreTerm):
    """A term without anything."""


class SilentMask(MaskTerm):
    """A mask without anything."""


class Misled(ScoreTerm):
    """A term whose functions are not what they should be."""

    @classmethod
    def triton_functions(cls) -> Any:
        return (1, 2)


@kernels
@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ([Silent()], TypeError, r"Silent must define triton_functions\(\) or name its functions"),
        ([SilentMask()], TypeError, r"SilentMask must define triton_functions\(\) or name"),
        ([Misled()], TypeError, r"Misled must return ScoreFunctions or MaskFunctions, got \(1, 2\)"),
        ([Band(9, 9)] * 7, ValueError, "terms may have 12 integers in all, got 14"),
    ],
)
def test_what_a_term_lacks_is_said(terms, error, message):
    with pytest.raises(error, match=message):
        fastattn.attention(*qkv(), score_mods=terms)


@pytest.mark.parametrize(
    ("mods", "error", "message"),
    [
        ([Silent()], TypeError, r"Silent must define score\(\)"),
        ([SilentMask()], TypeError, r"SilentMask must define keep\(\)"),
        (Silent(), TypeError, "score_mods must be a sequence of terms, got <"),
        ([torch.tanh], TypeError, "score_mods must hold ScoreTerm and MaskTerm, got <built-in"),
        (
            [Slope(torch.ones(2, requires_grad=True), 1.0)],
            ValueError,
            "score_mods: a tensor of Slope must not require a gradient",
        ),
        (
            [Slope(torch.ones(2, device="meta"), 1.0)],
            ValueError,
            "score_mods: a tensor of Slope must be on cpu, got meta",
        ),
    ],
)
def test_bad_terms_are_named(mods, error, message):
    x = torch.randn(1, 2, 5, 8)
    with fastattn.backend("reference"), pytest.raises(error, match=message):
        fastattn.attention(x, x, x, score_mods=mods)


# What follows looks into kernels as they run, which only the interpreter allows.

interpreted = pytest.mark.skipif(not INTERPRETED, reason="calls Python inside a kernel")

Blocks = set[tuple[int, int]]
COMPUTED: dict[str, Blocks] = {}
MASKED: dict[str, Blocks] = {}

if HAS_TRITON:

    def note(record: dict[str, Blocks], kernel: str, place: Any) -> None:
        record.setdefault(kernel, set()).add((int(place[4]), int(place[5])))

    @triton.jit
    def noted_score(score, m, n, place, args):
        # The tile of the gradients of keys is the transpose of the others.
        if m.shape[0] > 1:
            note(COMPUTED, "queries", place)
        else:
            note(COMPUTED, "keys", place)
        return score

    @triton.jit
    def noted_keep(m, n, place, args):
        if m.shape[0] > 1:
            note(MASKED, "queries", place)
        else:
            note(MASKED, "keys", place)
        return n == n

    @triton.jit
    def all_keys(first, last, place, args):
        return 0, place[3], 0, place[3]

    @triton.jit
    def all_queries(first, last, place, args):
        return 0, place[2], 0, place[2]


class Noted(ScoreTerm):
    """Notes the blocks that are computed."""

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(noted_score, same)


class NotedMask(MaskTerm):
    """Hides nothing, and notes the blocks in which masks are asked."""

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(noted_keep, all_keys, all_queries)


def noted(tensors: list[torch.Tensor], **options: Any) -> tuple[Results, list[dict[str, Blocks]]]:
    """The results, and the blocks computed and masked: forward, then backward."""
    records: list[dict[str, Blocks]] = []
    for record in (COMPUTED, MASKED):
        record.clear()
    o = fastattn.attention(*tensors, score_mods=[Noted(), NotedMask()], **options)
    records += [dict(COMPUTED), dict(MASKED)]
    for record in (COMPUTED, MASKED):
        record.clear()
    gradients = torch.autograd.grad(o.sum(), tensors)
    records += [dict(COMPUTED), dict(MASKED)]
    return {"o": o, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}, records


def blocks(seen: torch.Tensor, kernel: str) -> tuple[Blocks, Blocks]:
    """A kernel's blocks that hold something of `seen` (M, N), and those that hold nothing else."""
    some, full = set(), set()
    rows, columns = CONFIGS[kernel].block_m, CONFIGS[kernel].block_n
    for first_m in range(0, seen.shape[0], rows):
        for first_n in range(0, seen.shape[1], columns):
            block = seen[first_m : first_m + rows, first_n : first_n + columns]
            if block.any():
                some.add((first_m, first_n))
            # A sequence's last block is masked where it holds keys beyond the last one.
            if block.all() and first_n + columns <= seen.shape[1]:
                full.add((first_m, first_n))
    return some, full


@kernels
@interpreted
@pytest.mark.parametrize(
    ("options", "queries", "keys"),
    [
        ({}, 100, 100),
        ({"causal": True}, 100, 100),
        ({"causal": True}, 40, 120),
        ({"causal": True}, 120, 40),
        ({"causal": True, "window": (30, None)}, 120, 120),
        ({"window": (10, 70)}, 120, 120),
        ({"window": (None, 0)}, 100, 100),
        ({"kv_lengths": 75}, 40, 120),
        ({"kv_lengths": 0}, 40, 120),
    ],
    ids=str,
)
def test_blocks_that_nobody_sees_are_skipped_and_full_ones_are_not_masked(options, queries, keys):
    if "kv_lengths" in options:
        options = {"kv_lengths": torch.tensor([options["kv_lengths"]])}
    at = torch.arange(queries)[:, None] + keys - queries
    n = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    left, right = options.get("window", (None, None))
    if left is not None:
        seen &= n >= at - left
    if right is not None:
        seen &= n <= at + right
    if options.get("causal"):
        seen &= n <= at
    if "kv_lengths" in options:
        seen &= n < options["kv_lengths"]

    _, (forward, forward_masks, backward, backward_masks) = noted(
        qkv(1, 1, queries, keys, dim=8), **options
    )
    for kernel, computed, masks in (
        ("attention_forward", forward, forward_masks),
        ("attention_queries_backward", backward, backward_masks),
    ):
        some, full = blocks(seen, kernel)
        assert computed.get("queries", set()) == some
        assert masks.get("queries", set()) == some - full
    some, full = blocks(seen, "attention_keys_backward")
    assert backward.get("keys", set()) == some
    # For lack of registers there is no loop of full blocks where first keys are hidden; there is
    # one of those after masked blocks, incomplete ones included.
    asked = backward_masks.get("keys", set())
    assert asked == some if left is not None else asked <= some - full
