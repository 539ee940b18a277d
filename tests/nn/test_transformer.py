"""fastattn.nn's transformer layers and stacks in the places of torch's, over every option."""

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.nn
from fastattn.nn.sublayers import EPILOGUES, GATED, MODULES, STRINGS
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE, WIDEST, assert_close, count_launches, same_bits

B, H, L, S, E, HIDDEN = 2, 2, 5, 6, 8, 12

both_backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
)
# torch says so of its own layers too, where they cannot go through nested tensors.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


def tensor(*shape: int, dtype: torch.dtype = WIDEST) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE or "cpu", requires_grad=True)


def booleans(*shape: int) -> torch.Tensor:
    """True for a third, and never for a whole row."""
    masked = torch.rand(*shape, device=DEVICE or "cpu") < 0.33
    masked[..., 0] = False
    return masked


def floats(*shape: int) -> torch.Tensor:
    numbers = torch.randn(*shape, dtype=WIDEST, device=DEVICE or "cpu")
    return numbers.masked_fill(booleans(*shape), float("-inf"))


def padding(length: int) -> torch.Tensor:
    """Two sequences, of which the second is shorter."""
    return torch.arange(length, device=DEVICE or "cpu") >= torch.tensor(
        [[length], [length - 2]], device=DEVICE or "cpu"
    )


def causal(size: int, dtype: torch.dtype = WIDEST) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size, DEVICE or "cpu", dtype)


def stack(library: Any, part: str, layers: int, norm: bool, **options: Any) -> nn.Module:
    """An encoder or a decoder of a library's layers."""
    layer = getattr(library, f"Transformer{part}Layer")(E, H, HIDDEN, **options)
    last = nn.LayerNorm(E) if norm else None
    return getattr(library, f"Transformer{part}")(layer, layers, last)


def whole(library: Any, **options: Any) -> nn.Module:
    return library.Transformer(E, H, 1, 1, HIDDEN, **options)


MODULE: dict[str, Callable[..., nn.Module]] = {
    "encoder layer": lambda library, **o: library.TransformerEncoderLayer(E, H, HIDDEN, **o),
    "decoder layer": lambda library, **o: library.TransformerDecoderLayer(E, H, HIDDEN, **o),
    "encoder": lambda library, **o: stack(library, "Encoder", 2, True, **o),
    "decoder": lambda library, **o: stack(library, "Decoder", 2, False, **o),
    "transformer": whole,
}


def pair(kind: str, dtype: torch.dtype = WIDEST, **options: Any) -> tuple[Any, Any]:
    """Our module and torch's, drawn from one seed, then with parameters that are all random."""
    modules = []
    for library in (fastattn.nn, nn):
        torch.manual_seed(1)
        module = MODULE[kind](library, **{"dropout": 0.0, **options})
        modules.append(module.to(DEVICE or "cpu", dtype))
    ours, theirs = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(same_bits, ours.state_dict().values(), theirs.state_dict().values()))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    assert theirs.load_state_dict(ours.state_dict(), strict=True) == ([], [])
    return ours, theirs


def inputs_of(kind: str, **options: Any) -> tuple[torch.Tensor, ...]:
    shape = (B, L, E) if options.get("batch_first") else (L, B, E)
    other = (B, S, E) if options.get("batch_first") else (S, B, E)
    if kind in ("encoder layer", "encoder"):
        return (tensor(*shape),)
    # A decoder has its memory second, a transformer its target.
    return tensor(*shape), tensor(*other)


def outcome(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the inputs, the parameters and what masks are learned."""
    y = module(*inputs, **arguments)
    loss = (y * torch.linspace(-1, 2, y.numel()).to(y).view_as(y)).sum()
    wanted = dict(module.named_parameters())
    wanted |= {f"input {place}": x for place, x in enumerate(inputs)}
    wanted |= {
        name: mask
        for name, mask in arguments.items()
        if isinstance(mask, torch.Tensor) and mask.requires_grad
    }
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {"output": y.detach()} | dict(zip(wanted, gradients, strict=True))


def check(
    kind: str,
    backend: Any,
    options: dict[str, Any],
    inputs: tuple[torch.Tensor, ...] | None = None,
    **arguments: Any,
) -> None:
    """Outputs and gradients in training, and outputs in evaluation, with and without gradients."""
    ours, theirs = pair(kind, **options)
    inputs = inputs_of(kind, **options) if inputs is None else inputs
    expected = outcome(theirs, inputs, arguments)
    with fastattn.backend(backend):
        found = outcome(ours, inputs, arguments)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert_close(found[name], value, name)
    ours.eval()
    theirs.eval()
    # torch's fused evaluation takes every number of a mask that is not 0 for -inf, and each nn.GELU
    # for the exact one.
    masks = [mask for mask in arguments.values() if isinstance(mask, torch.Tensor)]
    adds = any(mask.is_floating_point() and (mask.isfinite() & (mask != 0)).any() for mask in masks)
    wrong = adds or getattr(options.get("activation"), "approximate", "none") != "none"
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), fused_evaluation(not wrong):
            expected = theirs(*inputs, **arguments)
            with fastattn.backend(backend):
                assert_close(ours(*inputs, **arguments), expected, f"evaluated, {recorded}")


@contextlib.contextmanager
def fused_evaluation(enabled: bool) -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(enabled)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "batch first": {"batch_first": True},
    "norm first": {"norm_first": True, "batch_first": True},
    "no biases": {"bias": False, "norm_first": True},
    "gelu": {"activation": "gelu", "layer_norm_eps": 0.1, "batch_first": True},
}


KINDS_AND_OPTIONS = [
    pytest.param(
        kind,
        options,
        id=f"{kind}, {name}",
        marks=[] if kind.endswith("layer") else [pytest.mark.slow],
    )
    for kind in MODULE
    for name, options in OPTIONS.items()
    # What a layer is shown to do a stack need not be.
    if kind.endswith("layer") or name in ("as it comes", "norm first")
]


@both_backends
@pytest.mark.parametrize(("kind", "options"), KINDS_AND_OPTIONS)
def test_outputs_and_gradients_are_those_of_torch(kind, options, backend):
    check(kind, backend, options)


LAYERS = {"encoder layer": ("src",), "decoder layer": ("tgt", "memory")}
MASKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "booleans": lambda keys: {"mask": booleans(L, keys)},
    "floats": lambda keys: {"mask": floats(L, keys)},
    "for each head": lambda keys: {"mask": booleans(B * H, L, keys)},
    "learned": lambda keys: {"mask": tensor(L, keys)},
    "padding": lambda keys: {"key_padding_mask": padding(keys)},
    "float padding": lambda keys: {"key_padding_mask": floats(B, keys)},
    "both": lambda keys: {"mask": booleans(L, keys), "key_padding_mask": padding(keys)},
    "mixed": lambda keys: {"mask": floats(L, keys), "key_padding_mask": padding(keys)},
    "causal": lambda keys: {"mask": causal(L)[:, :1].expand(L, keys) + 0.0, "is_causal": False},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@both_backends
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_masks_of_layers(kind, masks, backend):
    arguments: dict[str, Any] = {}
    for name in LAYERS[kind]:
        for key, value in masks(S if name == "memory" else L).items():
            arguments["is_causal" if (name, key) == ("src", "is_causal") else f"{name}_{key}"] = (
                value
            )
    check(kind, backend, {"batch_first": True}, **arguments)


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("hint", [None, True, False])
@pytest.mark.parametrize("dtype", [WIDEST, torch.bool])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_causal_masks_of_stacks(kind, dtype, hint, backend):
    mask = causal(L) if dtype is not torch.bool else causal(L) < 0
    if kind == "encoder":
        check(kind, backend, {}, mask=mask, is_causal=hint)
    else:
        check(kind, backend, {}, tgt_mask=mask, tgt_is_causal=hint)


@pytest.mark.kernels
@pytest.mark.parametrize("hint", [None, True])
def test_a_causal_mask_is_found_and_not_read(hint, monkeypatch):
    """As in torch: then the kernel skips what is masked."""
    from fastattn.nn import attention_masks

    kinds = []
    terms = attention_masks.Masks.make_terms
    monkeypatch.setattr(
        attention_masks.Masks, "make_terms", lambda *args: kinds.append(terms(*args)) or kinds[-1]
    )
    encoder, decoder = pair("encoder")[0], pair("decoder")[0]
    with fastattn.backend("triton"), torch.no_grad():
        encoder(tensor(L, B, E), causal(L), is_causal=hint)
        decoder(tensor(L, B, E), tensor(S, B, E), causal(L), tgt_is_causal=hint)
    assert [len(found) - 1 for found in kinds] == [0, 0, 0, -1, 0, -1]


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=["", "batch first"])
def test_masks_of_a_transformer(options, backend):
    check(
        "transformer",
        backend,
        options,
        src_mask=booleans(L, L),
        tgt_mask=causal(S),
        memory_mask=booleans(S, L),
        src_key_padding_mask=padding(L),
        tgt_key_padding_mask=floats(B, S),
        memory_key_padding_mask=padding(L),
        tgt_is_causal=True,
    )


@both_backends
@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer", "encoder", "decoder"])
def test_without_a_batch(kind, backend):
    inputs = (tensor(L, E),) if "encoder" in kind else (tensor(L, E), tensor(S, E))
    name = "src" if "encoder" in kind else "tgt"
    masks = {f"{name}_key_padding_mask": booleans(L)}
    check(kind, backend, {"norm_first": True}, inputs, **masks)


ACTIVATIONS: dict[str, Any] = {
    "F.gelu": F.gelu,
    "F.silu": F.silu,
    "tanh": torch.tanh,
    "nn.ReLU": nn.ReLU(),
    "nn.GELU tanh": nn.GELU("tanh"),
    "nn.SiLU": nn.SiLU(),
    "nn.LeakyReLU": nn.LeakyReLU(),
    "steep nn.LeakyReLU": nn.LeakyReLU(0.3),
    "nn.Softplus": nn.Softplus(),
    "a function": lambda x: x * x.cos(),
}


@both_backends
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(activation, backend):
    check("encoder layer", backend, {"activation": activation, "batch_first": True})


def test_tables_of_activations_name_what_they_say():
    x = torch.randn(40, dtype=torch.float64)
    from fastattn.reference.linear import ACTIVATIONS as NAMED

    for function, name in EPILOGUES:
        torch.testing.assert_close(function(x), NAMED[name](x))
    for kind, name in MODULES:
        torch.testing.assert_close(kind()(x), NAMED[name](x))


@both_backends
@pytest.mark.parametrize("part", ["Encoder", "Decoder"])
@pytest.mark.parametrize(
    "activation",
    [
        *(name for name in STRINGS if name.endswith("glu")),
        functools.partial(fastattn.geglu, approximate="tanh"),
    ],
    ids=[*(name for name in STRINGS if name.endswith("glu")), "partial"],
)
def test_gated_activations(activation, part, backend):
    """Beside torch's layer, whose linear2 gets as many columns as linear1 has."""
    layer = getattr(fastattn.nn, f"Transformer{part}Layer")
    ours = layer(E, H, HIDDEN, 0.0, activation).to(DEVICE or "cpu", WIDEST)
    function = STRINGS[activation] if isinstance(activation, str) else activation
    theirs = getattr(nn, f"Transformer{part}Layer")(E, H, HIDDEN, 0.0, function)
    theirs.linear1 = nn.Linear(E, 2 * HIDDEN)
    theirs.to(DEVICE or "cpu", WIDEST)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = inputs_of(f"{part.lower()} layer")
    with fastattn.backend(backend):
        found = outcome(ours, inputs, {})
    with fastattn.backend("reference"):
        expected = outcome(theirs, inputs, {})
    for name, value in expected.items():
        assert_close(found[name], value, name)
    assert len(GATED) == 4


def test_unknown_activations_give_torchs_error():
    for layer in (fastattn.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer):
        with pytest.raises(RuntimeError, match="activation should be relu/gelu"):
            layer(E, H, activation="swish")


@both_backends
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("at_the_end", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, WIDEST])
def test_padding_of_an_evaluated_encoder(dtype, at_the_end, nested, backend):
    """Where torch goes through nested tensors its output there is 0, which a norm moves."""
    modules = []
    for library in (fastattn.nn, nn):
        torch.manual_seed(1)
        layer = library.TransformerEncoderLayer(E, H, HIDDEN, batch_first=True)
        module = library.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        modules.append(module.to(DEVICE or "cpu", WIDEST).eval())
    ours, theirs = modules
    (x,) = inputs_of("encoder", batch_first=True)
    masked = padding(L) if at_the_end else padding(L).flip(1)
    mask = (
        masked if dtype is torch.bool else torch.zeros(B, L).to(x).masked_fill(masked, -torch.inf)
    )
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=mask)
        with fastattn.backend(backend):
            found = ours(x, src_key_padding_mask=mask)
    assert (expected[masked] == 0).all() == (nested and at_the_end)
    assert_close(found, expected)


def test_a_mask_that_is_written_to_is_looked_at_again():
    layer = fastattn.nn.TransformerEncoderLayer(E, H, HIDDEN, batch_first=True).eval()
    masked = torch.zeros(B, L, dtype=torch.bool)
    masked[1, -2:] = True
    x = torch.randn(B, L, E)
    with torch.no_grad():
        before = layer(x, src_key_padding_mask=masked)
        masked[1] = True
        after = layer(x, src_key_padding_mask=masked)
    with torch.inference_mode():
        assert layer(x, src_key_padding_mask=masked.clone()).isfinite().all()
    assert after.isfinite().all()
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-3)


@both_backends
@pytest.mark.parametrize("kind", ["encoder layer", "encoder"])
def test_a_sequence_of_padding_alone_is_finite(kind, backend):
    """torch's fused layer gives NaN for it."""
    ours, theirs = pair(kind, batch_first=True)
    (x,) = inputs_of(kind, batch_first=True)
    mask = torch.zeros(B, L, dtype=torch.bool, device=x.device)
    mask[1] = True
    ours.eval()
    theirs.eval()
    with fastattn.backend(backend):
        recorded = ours(x, src_key_padding_mask=mask)
        with torch.no_grad():
            found = ours(x, src_key_padding_mask=mask)
    assert_close(recorded, theirs(x, src_key_padding_mask=mask))
    assert_close(found[0], recorded[0])
    assert found.isfinite().all()


@pytest.mark.parametrize("length", [3, 50])
def test_masks_in_evaluation_on_a_cpu(length):
    ours, theirs = pair("encoder layer", torch.float64, batch_first=True)
    ours, theirs = ours.cpu().eval(), theirs.cpu().eval()
    x = torch.randn(1, length, E, dtype=torch.float64)
    for shape in ((1, length), (length, length), (H, length, length)):
        mask = torch.rand(shape) < 0.5
        mask[..., 0] = False
        name = "src_key_padding_mask" if shape[0] == 1 else "src_mask"
        with torch.no_grad(), fastattn.backend("reference"):
            found, expected = ours(x, **{name: mask}), theirs(x, **{name: mask})
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@both_backends
@pytest.mark.parametrize("kind", ["encoder layer", "encoder"])
def test_nested_tensors_as_far_as_torch_takes_them(kind, backend):
    ours, theirs = pair(kind, torch.float32, batch_first=True)
    nested = torch.nested.nested_tensor(
        [tensor(n, E, dtype=torch.float32).detach() for n in (3, 5)], layout=torch.strided
    )
    ours.eval()
    theirs.eval()
    with torch.no_grad(), fastattn.backend(backend):
        found, expected = ours(nested), theirs(nested)
    assert found.is_nested
    for a, b in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)
    with fastattn.backend(backend), pytest.raises(AssertionError, match="NestedTensor"):
        ours(nested)


ATTENTION = ["matmul", "attention_forward", "matmul"]
CROSS_ATTENTION = ["matmul", *ATTENTION]


@pytest.mark.kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_kernels_do_the_work(norm_first, training):
    """Five for an encoder layer beyond its attention, none of them for an addition alone."""
    options = {"batch_first": True, "norm_first": norm_first}
    encoder, decoder = pair("encoder layer", **options)[0], pair("decoder layer", **options)[0]
    encoder.train(training)
    decoder.train(training)
    x, memory = inputs_of("decoder layer", **options)
    first, behind = (["norm_forward"], []) if norm_first else ([], ["norm_forward"])
    feed_forward = ["matmul", "matmul"]
    with torch.set_grad_enabled(training):
        with count_launches() as launches:
            y = encoder(x, src_key_padding_mask=padding(L))
        assert launches == kernels(*first, *ATTENTION, "norm_forward", *feed_forward, *behind)
        with count_launches() as launches:
            decoder(x, memory, tgt_mask=causal(L), tgt_is_causal=True)
        assert launches == kernels(
            *first,
            *ATTENTION,
            "norm_forward",
            *CROSS_ATTENTION,
            "norm_forward",
            *feed_forward,
            *behind,
        )
    if training:
        with count_launches() as launches:
            y.sum().backward()
        assert launches.count("matmul_kernel") == 8
        assert sum("attention" in name for name in launches) == 3
        assert sum("norm_backward" in name for name in launches) >= 2


def kernels(*names: str) -> list[str]:
    return [f"{name}_kernel" for name in names]


@both_backends
def test_parts_with_hooks_or_of_other_classes_are_called(backend):
    ours, theirs = pair("encoder layer", batch_first=True)
    called: list[nn.Module] = []
    parts = ("linear1", "linear2", "norm1", "dropout", "dropout2", "self_attn")
    for module in (ours, theirs):
        for name in parts:
            getattr(module, name).register_forward_hook(lambda part, *_: called.append(part))
        module.norm2 = nn.RMSNorm(E).to(DEVICE or "cpu", WIDEST)
        module.activation = nn.ReLU()
        module.activation.register_forward_hook(lambda part, *_: called.append(part))
    inputs = inputs_of("encoder layer", batch_first=True)
    with fastattn.backend(backend):
        found = outcome(ours, inputs, {})
    assert len(called) == len(parts) + 1
    for name, value in outcome(theirs, inputs, {}).items():
        assert_close(found[name], value, name)


PARTS = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")


@both_backends
@pytest.mark.parametrize("name", PARTS)
def test_hooks_of_an_evaluated_layers_parts_are_called(name, backend):
    layer = pair("encoder layer", batch_first=True)[0].eval()
    (x,) = inputs_of("encoder layer", batch_first=True)
    with torch.no_grad(), fastattn.backend(backend):
        expected = layer(x)
        seen: list[nn.Module] = []
        getattr(layer, name).register_forward_hook(lambda part, *_: seen.append(part))
        assert_close(layer(x), expected)
    assert seen == [getattr(layer, name)]


@both_backends
def test_a_replaced_part_is_called_in_evaluation(backend):
    """torch's fused layer takes the parameters of the linear layer that was there."""
    layer = pair("encoder layer", batch_first=True)[0].eval()
    (x,) = inputs_of("encoder layer", batch_first=True)
    with fastattn.backend(backend):
        before = layer(x)
        layer.linear1 = nn.Sequential(layer.linear1, nn.Tanh())  # type: ignore[assignment]
        after = layer(x)
        with torch.no_grad():
            evaluated = layer(x)
    assert not torch.allclose(after, before)
    assert_close(evaluated, after)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap():
    layer = pair("encoder layer", batch_first=True)[0].eval()
    x = torch.stack([inputs_of("encoder layer", batch_first=True)[0] for _ in range(3)])
    with torch.no_grad(), fastattn.backend("reference"):
        mask = padding(L)
        found = torch.vmap(lambda x: layer(x, src_key_padding_mask=mask))(x)
        for one, given in zip(found, x, strict=True):
            assert_close(one, layer(given, src_key_padding_mask=mask))


@both_backends
def test_methods_that_a_subclass_overrides_are_called(backend):
    class Doubled(fastattn.nn.TransformerEncoderLayer):
        def _sa_block(self, *args: Any, **options: Any) -> torch.Tensor:
            return 2.0 * super()._sa_block(*args, **options)

    class TheirsDoubled(nn.TransformerEncoderLayer):
        def _sa_block(self, *args: Any, **options: Any) -> torch.Tensor:
            return 2.0 * super()._sa_block(*args, **options)

    theirs = TheirsDoubled(E, H, HIDDEN, 0.0).to(DEVICE or "cpu", WIDEST)
    ours = Doubled(E, H, HIDDEN, 0.0).to(DEVICE or "cpu", WIDEST)
    ours.load_state_dict(theirs.state_dict())
    (x,) = inputs_of("encoder layer")
    with fastattn.backend(backend):
        assert_close(ours(x), theirs(x))


@both_backends
def test_layers_of_torch_in_our_encoder(backend):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(E, H, HIDDEN, 0.0).to(DEVICE or "cpu", WIDEST)
    ours, theirs = (lib.TransformerEncoder(layer, 2) for lib in (fastattn.nn, nn))
    (x,) = inputs_of("encoder")
    arguments = {"mask": booleans(L, L), "src_key_padding_mask": padding(L)}
    with fastattn.backend(backend):
        assert_close(ours(x, **arguments), theirs(x, **arguments))


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer"])
def test_dropout(kind, backend):
    """The same seed gives the same, another another; p = 1 leaves the stream alone."""
    ours, theirs = pair(kind, dropout=0.3)
    inputs = inputs_of(kind)
    found = []
    with fastattn.backend(backend):
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            found.append(outcome(ours, inputs, {}))
        kept = ours.eval()(*inputs)
    assert all(map(same_bits, found[0].values(), found[1].values()))
    assert not torch.allclose(found[0]["output"], found[2]["output"])
    assert_close(kept, theirs.eval()(*inputs))


@both_backends
@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_of_everything(norm_first, backend):
    ours, theirs = pair("encoder layer", dropout=1.0, norm_first=norm_first)
    ours.self_attn.dropout = theirs.self_attn.dropout = 0.0
    (x,) = inputs_of("encoder layer")
    with fastattn.backend(backend):
        assert_close(ours(x), theirs(x))


@pytest.mark.slow
@both_backends
def test_means_under_dropout(backend):
    """Each of the dropouts has torch's mean and spread, seen by leaving the others out."""
    ours, theirs = pair("encoder layer", norm_first=True)
    x = tensor(L, 1, E).expand(L, 40, E)
    for name in ("dropout", "dropout1", "dropout2"):
        moments = []
        for module in (ours, theirs):
            getattr(module, name).p = 0.4
            with fastattn.backend(backend), torch.no_grad():
                drawn = module(x)
            getattr(module, name).p = 0.0
            moments.append((drawn.mean(1), drawn.std(1)))
        (mean, spread), (their_mean, their_spread) = moments
        error = (spread**2 + their_spread**2).sqrt() / 40**0.5
        assert ((mean - their_mean).abs() <= 5 * error + 1e-12).all(), name
        assert abs(spread.mean() / their_spread.mean() - 1) < 0.2, name


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("kind", MODULE)
def test_compiled_without_a_graph_break(kind, backend):
    options = {"batch_first": True, "norm_first": kind.startswith("decoder")}
    ours, _ = pair(kind, torch.float32, **options)
    inputs = tuple(x.detach().float().requires_grad_() for x in inputs_of(kind, **options))
    name = "src_mask" if kind.endswith("coder layer") else "mask"
    if kind.startswith("decoder") or kind == "transformer":
        name = "tgt_mask"
    length = S if kind == "transformer" else L
    arguments = {name: causal(length, torch.float32)}
    if kind == "encoder":
        arguments["src_key_padding_mask"] = floats(B, L).float()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with fastattn.backend(backend):
        found, expected = outcome(compiled, inputs, arguments), outcome(ours, inputs, arguments)
        for a, b in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        ours.eval()
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(*inputs, **arguments), ours(*inputs, **arguments), rtol=1e-4, atol=1e-4
            )
    torch.compiler.reset()


@pytest.fixture
def rounding(monkeypatch) -> None:
    """Let the interpreter round to bfloat16 as devices do, where it cuts off."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(builder: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, dtype)
        # The interpreter holds bfloat16 as integers.
        bits = torch.tensor(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer", "transformer"])
def test_autocast(rounding, kind, norm_first, backend):
    """As far from float32 as torch's own."""
    ours, theirs = pair(kind, torch.float32, norm_first=norm_first)
    inputs = tuple(x.detach().float().requires_grad_() for x in inputs_of(kind))
    found = []
    for module, enabled in ((ours, True), (theirs, True), (theirs, False)):
        chosen = backend if module is ours else "reference"
        device = inputs[0].device.type
        with fastattn.backend(chosen), torch.autocast(device, torch.bfloat16, enabled=enabled):
            y = module(*inputs)
            with torch.no_grad():
                evaluated = module.eval()(*inputs)
        gradients = torch.autograd.grad(y.float().square().sum(), [*inputs, *module.parameters()])
        found.append([y, evaluated, *gradients])
    for a, b, truth in zip(*found, strict=True):
        assert a.dtype is b.dtype
        error, allowed = ((x.float() - truth).norm() / truth.norm() for x in (a, b))
        # The factor that `fastattn.checking` grants gradients.
        assert error <= 3 * allowed + 0.003


@both_backends
@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer"])
def test_checkpoint_with_dropout(kind, backend):
    ours, _ = pair(kind, dropout=0.4)
    inputs = inputs_of(kind)
    results = []
    with fastattn.backend(backend):
        for call in (ours, functools.partial(checkpoint, ours, use_reentrant=False)):
            torch.manual_seed(5)
            y = call(*inputs)
            results.append([y, *torch.autograd.grad(y.sum(), [*inputs, *ours.parameters()])])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("kind", MODULE)
def test_copies_pickles_and_classes(kind):
    ours, theirs = pair(kind, activation="gelu")
    inputs = inputs_of(kind)
    y = ours(*inputs)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert same_bits(copied(*inputs), y)
        assert repr(copied) == repr(ours) == repr(theirs)
    for (name, a), (_, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert isinstance(a, type(b)), name
        if type(b).__name__ in fastattn.nn.__all__ and "Transformer" in type(b).__name__:
            assert type(a) is getattr(fastattn.nn, type(b).__name__)
        if isinstance(b, nn.MultiheadAttention):
            assert type(a) is fastattn.nn.MultiheadAttention


@pytest.mark.parametrize("kind", MODULE)
def test_dtype_and_device_reach_every_parameter(kind):
    options = {"activation": "swiglu"} if "layer" in kind else {}
    module: nn.Module = MODULE[kind](fastattn.nn, device="meta", dtype=torch.bfloat16, **options)
    own = {id(p) for p in module.get_submodule("norm").parameters()} if kind == "encoder" else set()
    parameters = [p for p in module.parameters() if id(p) not in own]
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in parameters)


def test_parts_of_ones_own_in_a_transformer():
    encoder = MODULE["encoder"](fastattn.nn)
    model = fastattn.nn.Transformer(E, H, num_decoder_layers=1, custom_encoder=encoder)
    assert model.encoder is encoder
    assert type(model.decoder) is fastattn.nn.TransformerDecoder
    mask = fastattn.nn.Transformer.generate_square_subsequent_mask(3)
    assert same_bits(mask, nn.Transformer.generate_square_subsequent_mask(3))


@both_backends
@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer", "encoder", "decoder"])
def test_a_causal_hint_without_a_mask_is_an_error(kind, backend):
    """In evaluation too, where torch's fused layers attend to everything."""
    ours, theirs = pair(kind, batch_first=True)
    inputs = inputs_of(kind, batch_first=True)
    hint = {"is_causal" if "encoder" in kind else "tgt_is_causal": True}
    with pytest.raises(RuntimeError, match="attn_mask"):
        theirs(*inputs, **hint)
    name = "src_key_padding_mask" if "encoder" in kind else "tgt_key_padding_mask"
    for training, masks in ((True, {}), (False, {}), (False, {name: padding(L)})):
        ours.train(training)
        with (
            fastattn.backend(backend),
            torch.set_grad_enabled(training),
            pytest.raises(RuntimeError, match="attn_mask"),
        ):
            ours(*inputs, **hint, **masks)


@both_backends
def test_bad_input_gives_torchs_types_of_error(backend):
    ours, theirs = pair("transformer")
    bad = [
        ((tensor(L, B, E), tensor(S, B + 1, E)), {}),
        ((tensor(L, B, E), tensor(S, B, E + 1)), {}),
        (inputs_of("transformer"), {"src_mask": torch.zeros(S, S).to(ours.encoder.norm.weight)}),
        (inputs_of("transformer"), {"src_mask": torch.zeros(L, L).int()}),
    ]
    for inputs, arguments in bad:
        with pytest.raises((RuntimeError, AssertionError)) as expected:
            theirs(*inputs, **arguments)
        for training in (True, False):
            ours.train(training)
            with (
                fastattn.backend(backend),
                torch.set_grad_enabled(training),
                pytest.raises(expected.type) as found,
            ):
                ours(*inputs, **arguments)
            assert type(found.value) is expected.type
