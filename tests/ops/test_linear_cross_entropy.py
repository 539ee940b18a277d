"""Linear cross entropy: chunks that change nothing, bounded memory, ignored rows, bad input."""

import itertools
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
import fastattn.functional
from fastattn.ops import linear_cross_entropy_chunks as chunks
from fastattn.ops.core.products import choose_engine
from fastattn.ops.linear_cross_entropy_chunks import LOGITS_BYTES, choose_chunk_rows
from support import DEVICE, WIDEST, assert_close, same_bits

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)

ROWS, COLUMNS, CLASSES = 10, 6, 13

SYNCHRONISING = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default"}


def operands(
    device: Any, dtype: torch.dtype = WIDEST, bias: bool = True, rows: int = ROWS
) -> tuple[torch.Tensor, ...]:
    """x, weight, target with some rows ignored, bias."""
    shapes = ((rows, COLUMNS), (CLASSES, COLUMNS), (CLASSES,))
    x, weight, b = (torch.randn(s, dtype=dtype, device=device).requires_grad_() for s in shapes)
    target = torch.randint(CLASSES, (rows,), device=device)
    target[1::4] = -100
    return (x, weight, target, b) if bias else (x, weight, target)


def gradients_of(
    loss: torch.Tensor, tensors: tuple[torch.Tensor, ...], *, again: bool = True
) -> list[torch.Tensor]:
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return list(torch.autograd.grad(loss, wanted, retain_graph=again))


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 5, 10, 64])
def test_any_chunks_give_the_plain_loss_and_gradients(device, reduction, chunk_rows):
    tensors = operands(device)
    x, weight, target, bias = tensors
    class_weight = torch.rand(CLASSES, dtype=WIDEST, device=device)
    for weights, smoothing in itertools.product((None, class_weight), (0.0, 0.2)):
        options: Any = {"reduction": reduction, "label_smoothing": smoothing}
        ours = fastattn.linear_cross_entropy(
            *tensors, class_weight=weights, chunk_rows=chunk_rows, **options
        )
        theirs = F.cross_entropy(F.linear(x, weight, bias), target, weights, **options)
        assert_close(ours, theirs, "loss")
        found = gradients_of(ours.cos().sum(), tensors)
        expected = gradients_of(theirs.cos().sum(), tensors)
        for name, a, b in zip(("dx", "dweight", "dbias"), found, expected, strict=True):
            assert_close(a, b, name)


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss_softcap_and_lse_in_chunks_by_their_definitions(device, reduction):
    tensors = operands(device)
    x, weight, target, bias = tensors
    logits = 2.0 * torch.tanh(F.linear(x, weight, bias) / 2.0)
    lse = logits.logsumexp(-1)
    losses = F.cross_entropy(logits, target, reduction="none")
    losses = losses + torch.where(target == -100, 0.0, 0.3 * lse.square())
    expected = {"mean": losses.sum() / (target != -100).sum(), "sum": losses.sum(), "none": losses}
    loss, found_lse = fastattn.linear_cross_entropy(
        *tensors, reduction=reduction, z_loss=0.3, softcap=2.0, return_lse=True, chunk_rows=4
    )
    assert_close(loss, expected[reduction], "loss")
    assert_close(found_lse, lse, "lse")
    places = torch.arange(ROWS, device=device)
    for ours, theirs in (
        (loss.sum(), expected[reduction].sum()),
        ((found_lse * places).sum(), (lse * places).sum()),
        (loss.sum() + found_lse.square().sum(), expected[reduction].sum() + lse.square().sum()),
    ):
        for a, b in zip(gradients_of(ours, tensors), gradients_of(theirs, tensors), strict=True):
            assert_close(a, b)


@both_backends
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk_rows", [3, 64])
def test_all_rows_ignored(device, label_smoothing, chunk_rows):
    tensors = operands(device)
    tensors[2].fill_(-100)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        loss = fastattn.linear_cross_entropy(
            *tensors, reduction=reduction, label_smoothing=label_smoothing, chunk_rows=chunk_rows
        )
        assert loss.item() == pytest.approx(expected, nan_ok=True)
        for gradient in gradients_of(loss, tensors):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_ignored_rows_hold_does_not_show(device, reduction, garbage):
    tensors = operands(device, torch.float32)
    options: Any = {"reduction": reduction, "z_loss": 0.1, "chunk_rows": 3}
    expected = fastattn.linear_cross_entropy(*tensors, **options)
    expected_gradients = gradients_of(expected.sum(), tensors)
    with torch.no_grad():
        tensors[0][tensors[2] == -100] = garbage
    found = fastattn.linear_cross_entropy(*tensors, **options)
    assert same_bits(found, expected)
    for a, b in zip(gradients_of(found.sum(), tensors), expected_gradients, strict=True):
        assert same_bits(a, b)


@both_backends
def test_ignored_rows_change_neither_the_mean_nor_the_gradients_of_others(device):
    x, weight, target = operands(device, bias=False)
    counting = target != -100
    results = []
    for given_x, given_target in ((x, target), (x[counting], target[counting])):
        loss = fastattn.linear_cross_entropy(given_x, weight, given_target, chunk_rows=4)
        results.append((loss, *gradients_of(loss, (x, weight))))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


@both_backends
@pytest.mark.parametrize("chunk_rows", [4, 64])
def test_a_second_backward_and_a_scaled_one(device, chunk_rows):
    tensors = operands(device)
    loss = fastattn.linear_cross_entropy(*tensors, chunk_rows=chunk_rows)
    first = gradients_of(loss, tensors)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(math.nan)
    for again, expected in zip(gradients_of(loss, tensors), kept, strict=True):
        assert same_bits(again, expected)
    for scaled, expected in zip(gradients_of(loss * -4.0, tensors), kept, strict=True):
        assert_close(scaled, expected * -4.0)


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor that an operation returned, and all operations' names."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self.nbytes = max(self.nbytes, output.nbytes)
        return outputs


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_logits_never_exist_for_more_rows_than_a_chunk(device, reduction, return_lse, monkeypatch):
    # The loop itself is watched, not the op that it is registered as.
    op = sys.modules["fastattn.ops.linear_cross_entropy"]
    monkeypatch.setattr(op, "linear_cross_entropy_chunks", chunks.cross_entropy_in_chunks)
    rows, chunk_rows = 40, 8
    x, weight, target = operands(device, torch.float32, bias=False, rows=rows)
    with LargestTensor() as seen:
        outputs = fastattn.linear_cross_entropy(
            x,
            weight,
            target,
            z_loss=0.1,
            reduction=reduction,
            return_lse=return_lse,
            chunk_rows=chunk_rows,
        )
        outputs = outputs if return_lse else (outputs,)
        torch.autograd.backward([output.sum() for output in outputs])
    assert 4 * chunk_rows * CLASSES <= seen.nbytes <= 4 * rows * COLUMNS
    # Nothing makes the host wait for a GPU; on a CPU the reference looks for wrong targets.
    assert choose_engine(x) == "torch" or not SYNCHRONISING & set(seen.names)


@both_backends
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (3,)], ids=["none", "x", "weight", "bias"])
def test_no_gradient_is_computed_that_nobody_wants(device, wanted, monkeypatch):
    products = []

    def counted(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        products.append((a.shape, b.shape))
        return product(a, b, **options)

    product = chunks.product
    monkeypatch.setattr(chunks, "product", counted)
    monkeypatch.setattr(chunks, "apply_linear", lambda x, weight, *_: F.linear(x, weight))
    tensors = operands(device, torch.float32)
    for place in (0, 1, 3):
        tensors[place].requires_grad_(place in wanted)
    loss = fastattn.linear_cross_entropy(*tensors, chunk_rows=5)
    assert loss.requires_grad == bool(wanted)
    assert len(products) == 2 * len({0, 1} & set(wanted))
    for place in (0, 1, 3):
        tensors[place].requires_grad_()
    products.clear()
    with torch.no_grad():
        fastattn.linear_cross_entropy(*tensors, chunk_rows=5)
    assert not products


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_of_a_mean_survive_16_bits_under_a_loss_scale(device, dtype):
    # Each row's share of the mean, 1e-4 of its gradient, would be lost in float16 if it were taken
    # before the incoming gradient, which is what scales the loss.
    torch.manual_seed(1)
    rows, classes, scale = 300, 200, 2.0**14
    x = (torch.randn(rows, 8, device=device) * 0.01).to(dtype).requires_grad_()
    weight = (torch.randn(classes, 8, device=device) * 0.01).to(dtype).requires_grad_()
    target = torch.arange(rows, device=device) % classes
    loss = fastattn.linear_cross_entropy(x, weight, target, chunk_rows=128)
    found = torch.autograd.grad(loss, (x, weight), torch.tensor(scale, dtype=dtype, device=device))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    exact = F.cross_entropy(F.linear(*wide), target)
    for a, b in zip(found, torch.autograd.grad(exact * scale, wide), strict=True):
        assert (a.double() - b).norm() <= 0.02 * b.norm()


@both_backends
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_with_ignored_rows(device, compiler, reduction):
    torch.compiler.reset()
    tensors = operands(device, torch.float32)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return fastattn.linear_cross_entropy(
            *tensors, reduction=reduction, label_smoothing=0.1, chunk_rows=4
        )

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    expected, found = loss(*tensors), compiled(*tensors)
    torch.testing.assert_close(found, expected)
    compiled_gradients = gradients_of(found.sum(), tensors, again=False)
    for a, b in zip(compiled_gradients, gradients_of(expected.sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


@both_backends
def test_lengths_do_not_recompile(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss_of(*tensors: torch.Tensor) -> torch.Tensor:
        return fastattn.linear_cross_entropy(*tensors, chunk_rows=4)

    compiled = torch.compile(loss_of, fullgraph=True, backend=counter, dynamic=True)
    compiled_frames = []
    for rows in (7, 9, 17, 30):
        tensors = operands(device, torch.float32, rows=rows)
        expected = fastattn.linear_cross_entropy(*tensors)
        loss = compiled(*tensors)
        torch.testing.assert_close(loss, expected)
        gradients_of(loss, tensors, again=False)
        compiled_frames.append(counter.frame_count)
    assert compiled_frames == compiled_frames[:1] * 4


@both_backends
def test_functorch_grad_in_chunks(device):
    x, weight, target = operands(device, bias=False)

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fastattn.linear_cross_entropy(x, weight, target, chunk_rows=4)

    found = torch.func.grad(loss, argnums=(0, 1))(x.detach(), weight.detach())
    for a, b in zip(found, gradients_of(loss(x, weight), (x, weight)), strict=True):
        assert_close(a, b)


@both_backends
@pytest.mark.parametrize("chunk_rows", [4, 64])
def test_autocast_casts_the_products_and_not_the_loss(device, chunk_rows):
    tensors = operands(device, torch.float32)
    expected = fastattn.linear_cross_entropy(*tensors)
    with torch.autocast(str(device), dtype=torch.bfloat16):
        loss, lse = fastattn.linear_cross_entropy(*tensors, return_lse=True, chunk_rows=chunk_rows)
    assert (loss.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert abs(loss.item() - expected.item()) < 2.0**-7 * expected.item()
    plain = gradients_of(expected, tensors)
    for a, b in zip(gradients_of(loss, tensors), plain, strict=True):
        assert a.dtype is torch.float32
        assert (a - b).norm() <= 2.0**-5 * b.norm()


@both_backends
def test_second_derivatives_through_chunks(device):
    results = []
    for chunk_rows in (3, 64):
        torch.manual_seed(0)
        tensors = operands(device)
        loss = fastattn.linear_cross_entropy(*tensors, z_loss=0.1, chunk_rows=chunk_rows)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        first = torch.autograd.grad(loss.square(), wanted, create_graph=True)
        results.append(gradients_of(sum(g.square().sum() for g in first), tensors))  # type: ignore[arg-type]
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


@pytest.mark.kernels
@pytest.mark.parametrize("wrong", [-1, CLASSES, 2**40, -(2**62)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_target_out_of_range_makes_its_own_loss_nan(wrong, weighted):
    tensors = operands(DEVICE, torch.float32)
    tensors[2][4] = wrong
    weights = torch.rand(CLASSES, device=DEVICE) if weighted else None
    losses = fastattn.linear_cross_entropy(
        *tensors, class_weight=weights, reduction="none", chunk_rows=4
    )
    assert losses.isnan().nonzero().tolist() == [[4]]
    assert fastattn.linear_cross_entropy(*tensors, class_weight=weights, chunk_rows=4).isnan()


@pytest.mark.parametrize("chunk_rows", [4, 64])
def test_a_target_out_of_range_raises_on_the_reference(chunk_rows):
    tensors = operands("cpu", torch.float32)
    for wrong in (-1, CLASSES):
        tensors[2][4] = wrong
        with (
            fastattn.backend("reference"),
            pytest.raises(ValueError, match=rf"target must be in \[0, 13\).*got {wrong}"),
        ):
            fastattn.linear_cross_entropy(*tensors, chunk_rows=chunk_rows)


@pytest.mark.parametrize("classes", [2, 1000, 32_000, 50_257, 131_072, 262_144, 2**21])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("engine", ["kernels", "auto", "torch"])
def test_chunks_are_thousands_of_rows_or_bounded(classes, itemsize, engine):
    rows = choose_chunk_rows(classes, itemsize, engine)
    assert rows % 128 == 0
    assert 128 <= rows <= 4096
    assert rows == 128 or rows * classes * itemsize <= LOGITS_BYTES[engine]
    # Not fewer rows than the bound asks for.
    assert rows == 4096 or (rows + 128) * classes * itemsize > LOGITS_BYTES[engine]


def test_chunks_on_a_gpu_are_two_to_four_thousand_rows_at_usual_vocabularies():
    for classes in (32_000, 50_257, 65_536):
        assert choose_chunk_rows(classes, 2, "auto") == 4096
    assert choose_chunk_rows(131_072, 2, "auto") == 2048


@pytest.mark.kernels
def test_the_kernels_are_asked_for_where_there_are_some():
    assert choose_engine(torch.zeros(1, device=DEVICE)) != "torch"


@both_backends
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("inner", [(), (4,)], ids=["vector", "sequence"])
def test_functional_has_torchs_arguments(device, probabilities, inner):
    x = torch.randn(5, COLUMNS, dtype=WIDEST, device=device, requires_grad=True)
    weight = torch.randn(CLASSES, *inner, COLUMNS, dtype=WIDEST, device=device).requires_grad_()
    bias = torch.randn(CLASSES, *inner, dtype=WIDEST, device=device).requires_grad_()
    logits = F.linear(x, weight.flatten(0, -2), bias.flatten()).unflatten(1, weight.shape[:-1])
    target = torch.randint(CLASSES, (5, *inner), device=device)
    if probabilities:
        target = torch.rand_like(logits)
    class_weight = torch.rand(CLASSES, dtype=WIDEST, device=device)
    every: list[dict[str, Any]] = [
        {},
        {"weight": class_weight, "label_smoothing": 0.1},
        {"reduction": "none"},
    ]
    for settings in every:
        ours = fastattn.functional.linear_cross_entropy(
            x, weight, target, linear_bias=bias, **settings
        )
        theirs = F.cross_entropy(logits, target, **settings)
        assert_close(ours, theirs)
        tensors = (x, weight, bias)
        for a, b in zip(
            gradients_of(ours.sum(), tensors), gradients_of(theirs.sum(), tensors), strict=True
        ):
            assert_close(a, b)


X, WEIGHT = torch.zeros(4, 3), torch.zeros(5, 3)
TARGET = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": TARGET}, TypeError, "x must be float16"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(())}, ValueError, "x must have at least one dimension"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must have shape \(V, 3\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have shape \(V, 3\)"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "at least one class"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must have x's dtype torch.float32"),
        ({"weight": WEIGHT.double()}, TypeError, "float64 mixes with no other dtype"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"bias": torch.zeros(5).half()}, TypeError, "bias must have x's dtype"),
        ({"target": [0]}, TypeError, "target must be a tensor"),
        ({"target": TARGET.int()}, TypeError, "target must be int64"),
        ({"target": torch.zeros(4, 5)}, TypeError, "probabilities there is cross_entropy"),
        ({"target": TARGET[:3]}, ValueError, r"target must have shape \(4,\), got \(3,\)"),
        ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must have shape \(5,\)"),
        (
            {"class_weight": torch.ones(5, requires_grad=True)},
            ValueError,
            "class_weight must not require",
        ),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be non-negative"),
        ({"softcap": -3.0}, ValueError, "softcap must be positive"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be positive"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments, error, message):
    given: Any = {"x": X, "weight": WEIGHT, "target": TARGET, **arguments}
    with pytest.raises(error, match=message):
        fastattn.linear_cross_entropy(**given)
