"""Rows whose target is ignore_index do not count: NaN and infinity in them reach nothing."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastattn
from fastattn import functional, nn
from fastattn.models._losses import sequence_loss, token_loss
from fastattn.models.llama import LlamaConfig
from support import DEVICE, WIDEST, assert_close

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

GARBAGE, REDUCTIONS = (math.nan, math.inf, -math.inf), ("mean", "sum", "none")
every_garbage = pytest.mark.parametrize("garbage", GARBAGE, ids=str)

ROWS, COLUMNS, CLASSES = 10, 6, 13

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def chosen(request) -> Iterator[None]:
    """The backend that a test is parametrized with."""
    with fastattn.backend(request.getfixturevalue("backend")):
        yield


def device_of(backend: str) -> Any:
    return DEVICE if backend == "triton" else "cpu"


def made(backend: str, dtype: torch.dtype = WIDEST) -> Tensors:
    """logits and operands of logits, and a target of which every third is ignored."""
    device = device_of(backend)
    shapes = {
        "logits": (ROWS, CLASSES),
        "x": (ROWS, COLUMNS),
        "weight": (CLASSES, COLUMNS),
        "bias": (CLASSES,),
    }
    tensors = {name: torch.randn(shape, dtype=dtype).to(device) for name, shape in shapes.items()}
    tensors["target"] = torch.randint(CLASSES, (ROWS,)).to(device)
    tensors["target"][1::3] = -100
    return tensors


def settings(place: int) -> Iterator[dict[str, Any]]:
    """A fourth of all combinations of what changes a row's loss; `place` modulo 4 says which."""
    combinations = itertools.product((None, 4.0), (0.0, 0.1), (0.0, 0.2), (False, True))
    for softcap, z_loss, smoothing, weighted in combinations:
        # Each fourth has both values of everything.
        if 2 * ((softcap is None) ^ (z_loss == 0.0)) + ((smoothing == 0.0) ^ weighted) != place % 4:
            continue
        yield {
            "softcap": softcap,
            "z_loss": z_loss,
            "label_smoothing": smoothing,
            "weighted": weighted,
        }


def outcome(
    function: Callable[..., Any], tensors: Tensors, of_lse: torch.Tensor | None, order: int
) -> tuple[list[torch.Tensor], Tensors]:
    """What `function` returns, and gradients of a scalar of it, by name.

    Args:
        function: of the tensors by name, to a loss or a loss and lse.
        tensors: those of floating-point numbers get gradients.
        of_lse: a factor of every row's lse in the scalar.
        order: 2 for the gradients of the gradients' squares.
    """
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }
    found = function(**tensors | leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    loss = outputs[0]
    weights = torch.linspace(1.0, 2.0, loss.numel(), device=loss.device).view(loss.shape)
    total = (loss * weights.to(loss)).sum()
    if of_lse is not None:
        total = total + (outputs[1] * of_lse).sum()
    wanted = list(leaves.values())
    gradients = torch.autograd.grad(total, wanted, create_graph=order == 2)
    if order == 2:
        again: Any = sum(gradient.square().sum() for gradient in gradients)
        gradients = torch.autograd.grad(again, wanted)
    return [output.detach() for output in outputs], dict(zip(leaves, gradients, strict=True))


def compare(
    function: Callable[..., Any],
    tensors: Tensors,
    holder: str,
    garbage: float,
    *,
    with_lse: bool = False,
    order: int = 1,
    what: str = "",
) -> None:
    """Garbage in ignored rows of `holder` gives what ordinary numbers there do, and 0 to itself."""
    ignored = tensors["target"] == -100
    spoilt = dict(tensors)
    spoilt[holder] = tensors[holder].masked_fill(ignored[:, None], garbage)
    if not with_lse:
        # One bad number in a row as well as nothing but bad ones.
        spoilt[holder][1, 1:] = tensors[holder][1, 1:]
    factors: list[torch.Tensor | None] = [None]
    counting = None
    if with_lse:
        every = torch.linspace(-1.0, 1.0, ROWS, device=ignored.device, dtype=WIDEST)
        counting = every.masked_fill(ignored, 0.0)
        # The lse of spoilt rows has no gradient, whatever comes in.
        factors = [counting, every]
    outputs, gradients = outcome(function, tensors, counting, order)
    for factor in factors:
        found, spoilt_gradients = outcome(function, spoilt, factor, order)
        assert_close(found[0], outputs[0], f"{what}: loss")
        if with_lse:
            assert_close(found[1][~ignored], outputs[1][~ignored], f"{what}: lse")
            assert outputs[1].isfinite().all(), what
        for name, gradient in gradients.items():
            if name == holder:
                assert not gradient[ignored].any(), f"{what}: {name}"
                assert not spoilt_gradients[name][ignored].any(), f"{what}: {name}"
            assert_close(spoilt_gradients[name], gradient, f"{what}: {name}")


@every_backend
@pytest.mark.parametrize(
    ("place", "case"),
    list(enumerate(itertools.product(GARBAGE, REDUCTIONS, (False, True)))),
    ids=str,
)
def test_cross_entropy(backend, place, case):
    garbage, reduction, with_lse = case
    tensors = made(backend)
    given = {name: tensors[name] for name in ("logits", "target")}
    weight = torch.rand(CLASSES, device=device_of(backend))
    for options in settings(place):
        what = str(options)
        weights = weight if options.pop("weighted") else None

        def loss(logits: torch.Tensor, target: torch.Tensor) -> Any:
            return fastattn.cross_entropy(
                logits,
                target,
                weight=weights,  # noqa: B023
                reduction=reduction,
                return_lse=with_lse,
                **options,  # noqa: B023
            )

        compare(loss, given, "logits", garbage, with_lse=with_lse, what=what)


@every_backend
@pytest.mark.parametrize(
    ("place", "case"),
    list(enumerate(itertools.product(GARBAGE, REDUCTIONS, (False, True), (3, ROWS, 64)))),
    ids=str,
)
@pytest.mark.slow
def test_linear_cross_entropy(backend, place, case):
    garbage, reduction, with_lse, chunk_rows = case
    tensors = made(backend)
    class_weight = torch.rand(CLASSES, device=device_of(backend))
    for number, options in enumerate(settings(place)):
        what = str(options)
        weights = class_weight if options.pop("weighted") else None
        names = ["x", "weight", "target", *(["bias"] if number % 2 else [])]

        def loss(**given: torch.Tensor) -> Any:
            return fastattn.linear_cross_entropy(
                **given,
                class_weight=weights,  # noqa: B023
                reduction=reduction,
                return_lse=with_lse,
                chunk_rows=chunk_rows,
                **options,  # noqa: B023
            )

        given = {name: tensors[name] for name in names}
        compare(loss, given, "x", garbage, with_lse=with_lse, what=what)


@every_backend
@every_garbage
@pytest.mark.parametrize("with_lse", [False, True])
def test_second_derivatives(backend, garbage, with_lse):
    tensors = made(backend)
    options: dict[str, Any] = {
        "softcap": 4.0,
        "z_loss": 0.1,
        "label_smoothing": 0.2,
        "return_lse": with_lse,
    }

    def plain(logits: torch.Tensor, target: torch.Tensor) -> Any:
        return fastattn.cross_entropy(logits, target, **options)

    given = {name: tensors.pop(name) for name in ("logits",)} | {"target": tensors["target"]}
    compare(plain, given, "logits", garbage, with_lse=with_lse, order=2)
    for chunk_rows in (3, 64):

        def linear(**given: torch.Tensor) -> Any:
            return fastattn.linear_cross_entropy(**given, chunk_rows=chunk_rows, **options)  # noqa: B023

        compare(linear, tensors, "x", garbage, with_lse=with_lse, order=2)


@every_backend
@every_garbage
@pytest.mark.parametrize("with_lse", [False, True])
def test_compiled(backend, garbage, with_lse):
    torch.compiler.reset()
    tensors = made(backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def plain(logits: torch.Tensor, target: torch.Tensor) -> Any:
        return fastattn.cross_entropy(logits, target, softcap=4.0, return_lse=with_lse)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def linear(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
        return fastattn.linear_cross_entropy(
            x, weight, target, softcap=4.0, return_lse=with_lse, chunk_rows=3
        )

    target = tensors["target"]
    compare(plain, {"logits": tensors["logits"], "target": target}, "logits", garbage)
    operands = {"x": tensors["x"], "weight": tensors["weight"], "target": target}
    compare(linear, operands, "x", garbage, with_lse=with_lse)


@every_backend
@every_garbage
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_gradient_in_the_place_of_the_logits(backend, garbage, softcap):
    tensors = made(backend)

    def loss(logits: torch.Tensor, target: torch.Tensor) -> Any:
        return fastattn.cross_entropy(
            logits.clone(), target, softcap=softcap, inplace_backward=True
        )

    compare(loss, {name: tensors[name] for name in ("logits", "target")}, "logits", garbage)


@every_backend
@every_garbage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_names(backend, garbage, dtype):
    tensors = made(backend, dtype)
    target, device = tensors["target"], device_of(backend)
    losses = {
        "functional": functional.cross_entropy,
        "module": nn.CrossEntropyLoss(label_smoothing=0.1),
        "summed": nn.CrossEntropyLoss(reduction="sum"),
    }
    for name, loss in losses.items():
        # (N, C), and (N, C, d) with a position behind the classes.
        for shape in ((ROWS, CLASSES), (2, CLASSES, 5)):
            logits = tensors["logits"].reshape(2, 5, CLASSES).transpose(1, 2)
            logits = (logits if len(shape) == 3 else tensors["logits"]).detach().clone()
            wanted = target.view(2, 5) if len(shape) == 3 else target
            hidden = (wanted == -100).unsqueeze(1)
            results = []
            for given in (logits, logits.masked_fill(hidden, garbage)):
                given.requires_grad_()
                value = loss(given, wanted)
                results.append((value, *torch.autograd.grad(value, given)))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b), name
            assert not results[1][1].masked_fill(~hidden, 0.0).any(), name

    for inner in ((), (4,)):
        module = nn.LinearCrossEntropyLoss(
            COLUMNS, CLASSES, out_features=inner, bias=True, device=device, dtype=dtype
        )
        wanted = target[:, None].expand(ROWS, 4).clone() if inner else target
        x = tensors["x"]
        results = []
        for given in (x, x.masked_fill((target == -100)[:, None], garbage)):
            given = given.clone().requires_grad_()
            value = module(given, wanted)
            results.append((value, *torch.autograd.grad(value, (given, *module.parameters()))))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), inner


@every_backend
@every_garbage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_of_models(backend, garbage, dtype):
    tensors = made(backend, dtype)
    labels = tensors["target"].view(2, 5)
    head = torch.nn.Linear(COLUMNS, CLASSES, bias=False, device=device_of(backend), dtype=dtype)
    results = []
    spoilt = tensors["x"].masked_fill((tensors["target"] == -100)[:, None], garbage)
    for x in (tensors["x"], spoilt):
        features = x.view(2, 5, COLUMNS).clone().requires_grad_()
        loss = token_loss(features, head, labels, softcap=3.0)
        results.append((loss, *torch.autograd.grad(loss, (features, head.weight))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)

    config = LlamaConfig(num_labels=CLASSES, problem_type="single_label_classification")
    logits = tensors["logits"].masked_fill((tensors["target"] == -100)[:, None], garbage)
    logits.requires_grad_()
    sequence_loss(config, logits, tensors["target"]).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@every_backend
def test_the_lse_of_an_ignored_row(backend):
    tensors = made(backend)
    target = tensors["target"]
    ignored = target == -100
    logits = tensors["logits"].requires_grad_()
    lse = fastattn.cross_entropy(logits, target, return_lse=True)[1]
    assert_close(lse, logits.logsumexp(-1))
    (gradient,) = torch.autograd.grad(lse.sum(), logits)
    assert_close(gradient, logits.softmax(-1))
    operands = [tensors[name].requires_grad_() for name in ("x", "weight")]
    for chunk_rows in (3, 64):
        lse = fastattn.linear_cross_entropy(
            *operands, target, return_lse=True, chunk_rows=chunk_rows
        )[1]
        expected = (operands[0] @ operands[1].t()).logsumexp(-1)
        assert_close(lse, expected)
        for a, b in zip(
            torch.autograd.grad(lse.square().sum(), operands),
            torch.autograd.grad(expected.square().sum(), operands),
            strict=True,
        ):
            assert_close(a, b)
    for garbage in (math.nan, math.inf, -math.inf):
        spoilt = logits.detach().masked_fill(ignored[:, None], garbage)
        lse = fastattn.cross_entropy(spoilt, target, return_lse=True)[1]
        assert torch.equal(lse.isnan(), ignored)
        for chunk_rows in (3, 64):
            x = operands[0].detach().masked_fill(ignored[:, None], garbage)
            lse = fastattn.linear_cross_entropy(
                x, operands[1], target, return_lse=True, chunk_rows=chunk_rows
            )[1]
            assert torch.equal(lse.isnan(), ignored)


@every_backend
@pytest.mark.parametrize("chunk_rows", [2, 64])
def test_an_ignored_row_whose_products_overflow(backend, chunk_rows):
    # x is finite, and its logits are not.
    device = device_of(backend)
    x = torch.ones(4, 3, device=device).half()
    x[1] = 6e4
    weight = torch.randn(5, 3, device=device).half() * 3.0
    target = torch.tensor([0, -100, 2, 3], device=device)
    x.requires_grad_()
    weight.requires_grad_()
    loss, lse = fastattn.linear_cross_entropy(
        x, weight, target, return_lse=True, chunk_rows=chunk_rows
    )
    assert lse.isnan().tolist() == [False, True, False, False]
    for gradient in torch.autograd.grad(loss + lse.sum(), (x, weight)):
        assert gradient.isfinite().all()
