"""fastattn.nn.MultiheadAttention in the place of torch's, over every option."""

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.nn
from fastattn.nn.attention_masks import collect_masks
from support import DEVICE, WIDEST, assert_close, count_launches, same_bits

B, H, L, S, E = 2, 2, 5, 7, 8

both_backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=WIDEST, device=DEVICE or "cpu", requires_grad=True)


def booleans(*shape: int) -> torch.Tensor:
    """True for a third, and never for a whole row."""
    masked = torch.rand(*shape, device=DEVICE or "cpu") < 0.33
    masked[..., 0] = False
    return masked


def floats(*shape: int) -> torch.Tensor:
    """Numbers, and -inf for a third."""
    numbers = torch.randn(*shape, dtype=WIDEST, device=DEVICE or "cpu")
    return numbers.masked_fill(booleans(*shape), float("-inf"))


def causal(size: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size, DEVICE or "cpu", WIDEST)


def pair(device: Any = None, dtype: Any = WIDEST, **options: Any) -> tuple[Any, Any]:
    """Our module and torch's, with parameters that are all random."""
    modules = []
    for cls in (fastattn.nn.MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(1)
        module = cls(E, H, **options)
        modules.append(module.to(device or DEVICE or "cpu", dtype))
    ours, theirs = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(same_bits, ours.state_dict().values(), theirs.state_dict().values()))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    assert theirs.load_state_dict(ours.state_dict(), strict=True) == ([], [])
    return ours, theirs


def same(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x, x, x


def cross(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return query, key, key


Case = tuple[dict[str, Any], Callable[[], tuple[torch.Tensor, ...]], Callable[[], dict[str, Any]]]
"""Options, inputs, and the masks of a call."""

FIRST = {"batch_first": True}

CASES: dict[str, Case] = {
    "self": ({}, lambda: same(tensor(L, B, E)), dict),
    "batch first": (FIRST, lambda: same(tensor(B, L, E)), dict),
    "no batch": ({}, lambda: same(tensor(L, E)), dict),
    "no batch, batch first": (FIRST, lambda: cross(tensor(L, E), tensor(S, E)), dict),
    "no biases": ({"bias": False}, lambda: same(tensor(L, B, E)), dict),
    "cross": (FIRST, lambda: cross(tensor(B, L, E), tensor(B, S, E)), dict),
    "cross, no biases": ({"bias": False}, lambda: cross(tensor(L, B, E), tensor(S, B, E)), dict),
    "three inputs": (FIRST, lambda: (tensor(B, L, E), tensor(B, S, E), tensor(B, S, E)), dict),
    "kdim and vdim": (
        {"kdim": 6, "vdim": 10},
        lambda: (tensor(L, B, E), tensor(S, B, 6), tensor(S, B, 10)),
        dict,
    ),
    "kdim, no biases": (
        {"kdim": 6, "bias": False, **FIRST},
        lambda: (tensor(B, L, E), tensor(B, S, 6), tensor(B, S, E)),
        dict,
    ),
    "bias_kv": ({"add_bias_kv": True}, lambda: cross(tensor(L, B, E), tensor(S, B, E)), dict),
    "zero_attn": ({"add_zero_attn": True, **FIRST}, lambda: same(tensor(B, L, E)), dict),
    "bias_kv, zero_attn, masks": (
        {"add_bias_kv": True, "add_zero_attn": True, **FIRST},
        lambda: cross(tensor(B, L, E), tensor(B, S, E)),
        lambda: {"attn_mask": booleans(L, S), "key_padding_mask": booleans(B, S)},
    ),
    "bias_kv, float masks, no batch": (
        {"add_bias_kv": True},
        lambda: cross(tensor(L, E), tensor(S, E)),
        lambda: {"attn_mask": floats(L, S), "key_padding_mask": floats(S)},
    ),
    "booleans": (
        {},
        lambda: cross(tensor(L, B, E), tensor(S, B, E)),
        lambda: {"attn_mask": booleans(L, S)},
    ),
    "booleans, batch first": (
        FIRST,
        lambda: same(tensor(B, L, E)),
        lambda: {"attn_mask": booleans(L, L)},
    ),
    "floats": (
        {},
        lambda: cross(tensor(L, B, E), tensor(S, B, E)),
        lambda: {"attn_mask": floats(L, S)},
    ),
    "booleans for each head": (
        FIRST,
        lambda: cross(tensor(B, L, E), tensor(B, S, E)),
        lambda: {"attn_mask": booleans(B * H, L, S)},
    ),
    "floats for each head, no batch": (
        {},
        lambda: cross(tensor(L, E), tensor(S, E)),
        lambda: {"attn_mask": floats(H, L, S)},
    ),
    "padding": (
        FIRST,
        lambda: same(tensor(B, L, E)),
        lambda: {"key_padding_mask": booleans(B, L)},
    ),
    "float padding": (
        {},
        lambda: same(tensor(L, B, E)),
        lambda: {"key_padding_mask": floats(B, L)},
    ),
    "padding, no batch": (
        {},
        lambda: same(tensor(L, E)),
        lambda: {"key_padding_mask": booleans(L)},
    ),
    "both masks": (
        {},
        lambda: cross(tensor(L, B, E), tensor(S, B, E)),
        lambda: {"attn_mask": booleans(B * H, L, S), "key_padding_mask": booleans(B, S)},
    ),
    "booleans and float padding": (
        {},
        lambda: same(tensor(L, B, E)),
        lambda: {"attn_mask": booleans(L, L), "key_padding_mask": floats(B, L)},
    ),
    "floats and padding": (
        FIRST,
        lambda: same(tensor(B, L, E)),
        lambda: {"attn_mask": floats(L, L), "key_padding_mask": booleans(B, L)},
    ),
    "causal": (
        FIRST,
        lambda: same(tensor(B, L, E)),
        lambda: {"attn_mask": causal(L), "is_causal": True},
    ),
    "causal and padding": (
        {},
        lambda: same(tensor(L, B, E)),
        lambda: {
            "attn_mask": causal(L),
            "is_causal": True,
            "key_padding_mask": booleans(B, L).to(WIDEST) * -2.0,
        },
    ),
    "causal, bias_kv": (
        {"add_bias_kv": True},
        lambda: same(tensor(L, B, E)),
        lambda: {"attn_mask": causal(L), "is_causal": True},
    ),
    "learned": (
        {},
        lambda: same(tensor(L, B, E)),
        lambda: {"attn_mask": tensor(L, L)},
    ),
    "learned for each head and padding": (
        FIRST,
        lambda: cross(tensor(B, L, E), tensor(B, S, E)),
        lambda: {"attn_mask": tensor(B * H, L, S), "key_padding_mask": booleans(B, S)},
    ),
}
WEIGHTS = {
    "no weights": {"need_weights": False},
    "weights": {},
    "weights of heads": {"average_attn_weights": False},
}


def outcome(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], arguments: dict[str, Any]
) -> dict[str, Any]:
    """Outputs, and the gradients of the inputs, the parameters and what masks are learned."""
    output, weights = module(*inputs, **arguments)
    found = {"output": output, "weights": weights}
    loss = (output * torch.linspace(-1, 2, output.numel()).to(output).view_as(output)).sum()
    if weights is not None:
        loss = (
            loss + (weights * torch.linspace(1, 3, weights.numel()).to(loss).view_as(weights)).sum()
        )
    wanted = dict(module.named_parameters())
    wanted |= {f"input {place}": x for place, x in enumerate(inputs)}
    wanted |= {
        name: mask
        for name, mask in arguments.items()
        if isinstance(mask, torch.Tensor) and mask.requires_grad
    }
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return found | dict(zip(wanted, gradients, strict=True))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name].shape == value.shape, name
            assert_close(found[name], value, name)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@both_backends
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_torch(case, weights, backend):
    options, make_inputs, make_masks = case
    ours, theirs = pair(**options)
    inputs, arguments = make_inputs(), {**make_masks(), **weights}
    expected = outcome(theirs, inputs, arguments)
    with fastattn.backend(backend):
        assert_same(outcome(ours, inputs, arguments), expected)
        with torch.no_grad():
            evaluated = ours.eval()(*inputs, **arguments)
    with torch.no_grad():
        expected = theirs.eval()(*inputs, **arguments)
    names = ("output", "weights")
    assert_same(dict(zip(names, evaluated, strict=True)), dict(zip(names, expected, strict=True)))


@both_backends
@pytest.mark.parametrize("dtype", [torch.bool, WIDEST])
@pytest.mark.parametrize("where", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_query_without_keys_has_nan_with_weights_and_0_without(where, dtype, gradients, backend):
    ours, theirs = pair(**FIRST)
    ours.eval()
    theirs.eval()
    x = tensor(B, L, E)
    masked = torch.zeros((L, L) if where == "attn_mask" else (B, L), dtype=torch.bool)
    masked[1] = True
    mask = masked.to(x.device)
    if dtype is not torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    with fastattn.backend(backend), torch.set_grad_enabled(gradients):
        output, weights = ours(x, x, x, **{where: mask})
        alone, _ = ours(x, x, x, **{where: mask}, need_weights=False)
    places = (slice(None), 1) if where == "attn_mask" else (1,)
    assert output[places].isnan().all()
    assert weights[places].isnan().all()
    assert output.isnan().sum() == output[places].numel()
    # torch's fused evaluation would give NaN here too, and nothing at all is what out_proj is for.
    assert_close(alone[places], theirs.out_proj.bias.expand_as(alone[places]))
    expected, _ = theirs(x, x, x, **{where: mask}, need_weights=False)
    assert_close(alone, expected)
    if gradients:
        (dx,) = torch.autograd.grad(alone.sum(), x)
        assert_close(dx, torch.autograd.grad(expected.sum(), x)[0])


@both_backends
def test_a_causal_hint_stands_for_the_mask_only_where_torch_lets_it(backend):
    """Seen by a hint that is wrong."""
    ours, theirs = pair(**FIRST)
    x, mask, padding = tensor(B, L, E), booleans(L, L), booleans(B, L)
    for arguments in (
        {"need_weights": False},
        {"need_weights": False, "key_padding_mask": padding},
        {"need_weights": True},
    ):
        arguments |= {"attn_mask": mask, "is_causal": True}
        with fastattn.backend(backend):
            found, _ = ours(x, x, x, **arguments)
        assert_close(found, theirs(x, x, x, **arguments)[0], str(arguments.keys()))


def test_masks_are_not_expanded():
    attn_mask, padding = booleans(L, S), booleans(B, S)
    masks = collect_masks(attn_mask, padding, H)
    assert [tuple(mask.shape) for mask in masks.keep] == [(1, 1, L, S), (B, 1, 1, S)]
    assert masks.bias == []
    heads = collect_masks(floats(B * H, L, S), None, H, added_keys=2)
    assert [tuple(mask.shape) for mask in heads.bias] == [(B, H, L, S + 2)]
    assert (heads.bias[0][..., S:] == 0).all()


@pytest.mark.kernels
@pytest.mark.parametrize("training", [True, False])
def test_kernels_do_the_work(training):
    ours, _ = pair(**FIRST)
    ours.train(training)
    x = tensor(B, L, E)
    with torch.set_grad_enabled(training):
        with count_launches() as launches:
            output, _ = ours(x, x, x, key_padding_mask=booleans(B, L), need_weights=False)
        assert Counter(launches) == {"matmul_kernel": 2, "attention_forward_kernel": 1}
        with count_launches() as launches:
            ours(x, x, x)
        assert Counter(launches) == {"matmul_kernel": 4, "softmax_forward_kernel": 1}
    if training:
        with count_launches() as launches:
            output.sum().backward()
        assert launches.count("matmul_kernel") == 4
        assert sum("attention" in name for name in launches) == 3


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout(need_weights, backend):
    """Its mean is what there is without; the same seed gives the same; weights are after it."""
    ours, theirs = pair(dropout=0.25, **FIRST)
    x = tensor(B, L, E)
    keys = torch.randn(B, 64, E, dtype=WIDEST, device=x.device)
    with fastattn.backend(backend), torch.no_grad():
        torch.manual_seed(3)
        output, weights = ours(x, keys, keys, need_weights=need_weights)
        torch.manual_seed(3)
        again, _ = ours(x, keys, keys, need_weights=need_weights)
        other, _ = ours(x, keys, keys, need_weights=need_weights)
        drawn = torch.stack([ours(x, keys, keys, need_weights=need_weights)[0] for _ in range(24)])
        expected, _ = ours.eval()(x, keys, keys, need_weights=need_weights)
    assert same_bits(output, again)
    assert not torch.equal(output, other)
    deviation = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - expected).abs() <= 5 * deviation).all()
    assert (drawn.std(0) > 0).all()
    assert_close(expected, theirs.eval()(x, keys, keys)[0])
    if need_weights:
        assert not torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-3)


def test_torchs_random_numbers_on_the_reference_backend():
    ours, theirs = pair(dropout=0.25, **FIRST)
    x = tensor(B, L, E)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        with fastattn.backend("reference"):
            found.append(module(x, x, x, need_weights=False)[0])
    assert_close(*found)


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("need_weights", [True, False])
def test_compiled_without_a_graph_break(need_weights, backend):
    ours, _ = pair(dtype=torch.float32, **FIRST)
    x, padding = tensor(B, L, E).detach().float(), booleans(B, L)
    arguments = {"attn_mask": causal(L).float(), "need_weights": need_weights}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with fastattn.backend(backend):
        for masks in ({"key_padding_mask": padding.float() * -1.0}, {"is_causal": True}):
            found = outcome(compiled, (x.requires_grad_(),) * 3, {**arguments, **masks})
            expected = outcome(ours, (x,) * 3, {**arguments, **masks})
            for a, b in zip(found.values(), expected.values(), strict=True):
                if b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            ours.eval()
            torch.testing.assert_close(
                compiled(x, x, x, padding)[0], ours(x, x, x, padding)[0], rtol=1e-4, atol=1e-5
            )
    torch.compiler.reset()


@both_backends
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_gives_torchs_dtypes(need_weights, backend):
    ours, theirs = pair(dtype=torch.float32, **FIRST)
    x = tensor(B, L, E).detach().float().requires_grad_()
    arguments = {"attn_mask": booleans(L, L), "need_weights": need_weights}
    found = []
    for module, chosen in ((ours, backend), (theirs, "reference")):
        with fastattn.backend(chosen), torch.autocast(x.device.type, torch.bfloat16):
            output, weights = module(x, x, x, **arguments)
        loss = output.float().sum() + (0.0 if weights is None else weights[..., 1].sum())
        gradients = torch.autograd.grad(loss, [x, *module.parameters()])
        found.append([output, weights, *gradients])
    for a, b in zip(*found, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b, rtol=0.03, atol=0.03 * b.abs().max().item())


@both_backends
def test_checkpoint_with_dropout(backend):
    ours, _ = pair(dropout=0.5, **FIRST)
    x = tensor(B, L, E)
    results = []
    with fastattn.backend(backend):
        for call in (
            ours,
            lambda *args, **options: checkpoint(ours, *args, use_reentrant=False, **options),
        ):
            torch.manual_seed(5)
            y, _ = call(x, x, x, need_weights=False)
            results.append([y, *torch.autograd.grad(y.sum(), [x, *ours.parameters()])])
    assert all(map(same_bits, *results))


@both_backends
def test_copies_and_pickles(backend):
    ours, _ = pair(add_bias_kv=True, **FIRST)
    x = tensor(B, L, E)
    with fastattn.backend(backend):
        y, _ = ours(x, x, x, need_weights=False)
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(copied) is fastattn.nn.MultiheadAttention
            assert repr(copied) == repr(ours)
            assert same_bits(copied(x, x, x, need_weights=False)[0], y)


def test_parameters_are_shared_with_the_module_given():
    theirs = nn.MultiheadAttention(E, H, dropout=0.1, kdim=6, batch_first=True).eval()
    ours = fastattn.nn.MultiheadAttention.sharing(theirs)
    assert isinstance(ours, fastattn.nn.MultiheadAttention)
    for (name, a), (other, b) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other
        assert a is b
    assert (ours.dropout, ours.kdim, ours.batch_first, ours.training) == (0.1, 6, True, False)


def test_dtype_and_device_reach_every_parameter():
    module = fastattn.nn.MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in module.parameters())


@both_backends
def test_nested_tensors_as_far_as_torch_takes_them(backend):
    ours, theirs = pair(dtype=torch.float32, **FIRST)
    sequences = [torch.randn(n, E, device=ours.out_proj.weight.device) for n in (3, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(sequences)
    ours.eval()
    theirs.eval()
    with fastattn.backend(backend), torch.no_grad():
        found, _ = ours(nested, nested, nested, need_weights=False)
    with torch.no_grad():
        expected, _ = theirs(nested, nested, nested, need_weights=False)
    assert found.is_nested
    for a, b in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)
    with fastattn.backend(backend), pytest.raises(AssertionError, match="NestedTensor"):
        ours(nested, nested, nested, need_weights=False)


BAD: dict[str, tuple[dict[str, Any], Callable[[], tuple], dict[str, Any]]] = {
    "four dimensions": ({}, lambda: same(tensor(1, L, B, E)), {}),
    "a batch of queries alone": ({}, lambda: cross(tensor(L, B, E), tensor(S, E)), {}),
    "features": ({}, lambda: same(tensor(L, B, E + 1)), {}),
    "lengths of key and value": (
        {},
        lambda: (tensor(L, B, E), tensor(S, B, E), tensor(L, B, E)),
        {},
    ),
    "batches": ({}, lambda: cross(tensor(L, B, E), tensor(S, B + 1, E)), {}),
    "integers": ({}, lambda: same(tensor(L, B, E)), {"attn_mask": torch.zeros(L, L).int()}),
    "mask of integers": (
        {},
        lambda: same(tensor(L, E)),
        {"key_padding_mask": torch.zeros(L).int()},
    ),
    "mask's shape": ({}, lambda: same(tensor(L, B, E)), {"attn_mask": torch.zeros(L, S)}),
    "mask for other heads": (
        {},
        lambda: same(tensor(L, B, E)),
        {"attn_mask": torch.zeros(3, L, L)},
    ),
    "mask for heads, no batch": (
        {},
        lambda: same(tensor(L, E)),
        {"attn_mask": torch.zeros(3, L, L)},
    ),
    "mask of one dimension": ({}, lambda: same(tensor(L, B, E)), {"attn_mask": torch.zeros(L)}),
    "padding's shape": (
        {},
        lambda: same(tensor(L, B, E)),
        {"key_padding_mask": torch.zeros(B, S, dtype=WIDEST)},
    ),
    "padding without a batch": (
        {},
        lambda: same(tensor(L, E)),
        {"key_padding_mask": torch.zeros(B, L)},
    ),
    "a hint without a mask": ({}, lambda: same(tensor(L, B, E)), {"is_causal": True}),
    "dtype": ({}, lambda: same(tensor(L, B, E).half()), {}),
}


@both_backends
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
@pytest.mark.parametrize("need_weights", [True, False])
def test_bad_input_gives_torchs_types_of_error(case, need_weights, backend):
    options, make_inputs, arguments = case
    ours, theirs = pair(**options)
    inputs = make_inputs()
    arguments = {
        name: value.to(inputs[0].device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    arguments |= {"need_weights": need_weights}
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        theirs(*inputs, **arguments)
    with pytest.raises(expected.type) as found, fastattn.backend(backend):
        ours(*inputs, **arguments)
    assert type(found.value) is expected.type
    if backend == "triton":
        assert "MultiheadAttention: " in str(found.value)


@pytest.mark.parametrize("arguments", [(0, 1), (8, 0), (8, 3)])
def test_bad_sizes_give_torchs_errors(arguments):
    with pytest.raises((ValueError, AssertionError)) as expected:
        nn.MultiheadAttention(*arguments)
    with pytest.raises(expected.type, match=str(expected.value)[:20]):
        fastattn.nn.MultiheadAttention(*arguments)


@both_backends
def test_a_hint_without_a_mask_is_an_error_in_evaluation_too(backend):
    """torch's fused evaluation attends to everything."""
    ours, _ = pair(**FIRST)
    x = tensor(B, L, E)
    with torch.no_grad(), fastattn.backend(backend), pytest.raises(RuntimeError, match="attn_mask"):
        ours.eval()(x, x, x, is_causal=True)


@both_backends
def test_mixed_masks_warn_as_in_torch(backend):
    ours, theirs = pair()
    x = tensor(L, B, E)
    for module in (ours, theirs):
        with (
            pytest.warns(UserWarning, match="mismatched key_padding_mask"),
            fastattn.backend(backend),
        ):
            module(
                x, x, x, attn_mask=booleans(L, L), key_padding_mask=floats(B, L), need_weights=False
            )


@both_backends
def test_no_queries_and_keys_without_a_batch(backend):
    ours, theirs = pair()
    x = tensor(0, E)
    with fastattn.backend(backend):
        found, _ = ours(x, x, x, need_weights=False)
    expected, _ = theirs(x, x, x, need_weights=False)
    assert found.shape == expected.shape == (0, E)
