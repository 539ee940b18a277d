"""fastattn.batch_invariant: a sequence has the same bits alone, in any batch, padded or packed."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
import fastattn.nn
from fastattn.kernels.attention.config import attention_forward_config
from fastattn.kernels.config import Target
from fastattn.ops.core.backends import INTERPRETED
from fastattn.ops.core.batch_invariance import is_batch_invariant
from support import DEVICE, same_bits

TOKENS = 5
LONGEST = 21
FEATURES = 300
"""Long enough for a product of few rows to be split, see `test_products_depend_on_the_batch`."""

Rows = dict[str, torch.Tensor]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def like(x: torch.Tensor, *shape: int, seed: int = 9) -> torch.Tensor:
    """Parameters of x's dtype and device, the same every time."""
    return 0.1 * random(*shape, seed=seed, dtype=x.dtype)


def rotary(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Two heads of 8 columns, turned by the first four columns of `angle`."""
    lead = x.shape[:-1]
    heads = x.reshape(-1, lead[-1], 2, 8).transpose(1, 2)
    table = angle[..., :4].reshape(-1, lead[-1], 4)
    turned = fastattn.apply_rotary(heads, table.cos(), table.sin())
    return turned.transpose(1, 2).reshape(*lead, 16)


def token_losses(function: Callable, x: torch.Tensor, **options: Any) -> torch.Tensor:
    """The loss of every token, whose target is its place in the longest of its features."""
    target = x.detach().argmax(-1) % 13
    return function(x, target=target, reduction="none", **options)[..., None]


def token_log_probs(function: Callable, x: torch.Tensor, **options: Any) -> torch.Tensor:
    """The log-probability of the same targets beside the entropy."""
    target = x.detach().argmax(-1) % 13
    options |= {"return_entropy": True, "temperature": 0.7}
    return torch.stack(function(x, target=target, **options), -1)


def mlp(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    module.to(x)
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.copy_(like(x, *parameter.shape, seed=place))
    return module(x)


# An op as a function of one row a token, and how many columns that has.
PRODUCTS: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "matmul": (FEATURES, lambda x: fastattn.matmul(x, like(x, FEATURES, 24))),
    "linear": (FEATURES, lambda x: fastattn.linear(x, like(x, 24, FEATURES), like(x, 24))),
    "linear, gelu and residual": (
        FEATURES,
        lambda x: fastattn.linear(
            x, like(x, 24, FEATURES), activation="gelu", residual=x[..., :24] + 1.0
        ),
    ),
    "linear_cross_entropy": (
        FEATURES,
        lambda x: token_losses(
            fastattn.linear_cross_entropy,
            x,
            weight=like(x, 13, FEATURES),
            bias=like(x, 13),
            chunk_rows=48,
        ),
    ),
    "linear_log_prob": (
        FEATURES,
        lambda x: token_log_probs(
            fastattn.linear_log_prob, x, weight=like(x, 13, FEATURES), chunk_rows=48
        ),
    ),
    "MLP": (FEATURES, lambda x: mlp(x, fastattn.nn.MLP(FEATURES, 24, 10))),
}
OTHERS: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "GatedMLP": (40, lambda x: mlp(x, fastattn.nn.GatedMLP(40, 72, 40))),
    "gated_linear": (
        FEATURES,
        lambda x: fastattn.gated_linear(x, like(x, 24, FEATURES), like(x, 24, FEATURES, seed=8)),
    ),
    "rms_norm": (130, lambda x: fastattn.rms_norm(x, like(x, 130))),
    "wide rms_norm": (9000, lambda x: fastattn.rms_norm(x, like(x, 9000))),
    "layer_norm": (130, lambda x: fastattn.layer_norm(x, like(x, 130), like(x, 130))),
    "add_rms_norm": (130, lambda x: fastattn.add_rms_norm(x, x.sin(), like(x, 130))[0]),
    "softmax": (130, fastattn.softmax),
    "log_softmax": (130, fastattn.log_softmax),
    "swiglu": (130, fastattn.swiglu),
    "geglu": (130, fastattn.geglu),
    "apply_rotary": (16, lambda x: rotary(x, x.detach())),
    "cross_entropy": (130, lambda x: token_losses(fastattn.cross_entropy, x, z_loss=0.01)),
    "log_prob": (130, lambda x: token_log_probs(fastattn.log_prob, x)),
}
OPS = PRODUCTS | OTHERS


def sequence(columns: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a sequence, and the gradients that come to their outputs."""
    length = (TOKENS, LONGEST, 8)[seed]
    return random(length, columns, seed=seed, dtype=dtype), random(length, columns, seed=seed + 10)


def batches(columns: int, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor, Any]]:
    """Tokens, incoming gradients, and where the sequence of TOKENS tokens is among them."""
    (own, down), (long, down_long), (third, down_third) = (
        sequence(columns, dtype, seed) for seed in range(3)
    )
    found = {"alone": (own[None], down[None], (0,))}
    found["in a batch"] = (
        torch.stack([own, long[:TOKENS], third[:TOKENS]]),
        torch.stack([down, down_long[:TOKENS], down_third[:TOKENS]]),
        (0,),
    )
    padded, down_padded = long.expand(3, -1, -1).clone(), down_long.expand(3, -1, -1).clone()
    padded[2, :TOKENS], down_padded[2, :TOKENS] = own, down
    found["padded, at another place"] = (padded, down_padded, (2, slice(TOKENS)))
    start = LONGEST + 8
    found["packed"] = (
        torch.cat([long, third, own]),
        torch.cat([down_long, down_third, down]),
        (slice(start, start + TOKENS),),
    )
    found["one token"] = (own[:1], down[:1], (slice(1),))
    return found


def results(
    name: str, dtype: torch.dtype, batch: str, switch: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence's output and the gradient of its tokens; the switch is off in the backward."""
    columns, op = OPS[name]
    x, down, place = batches(columns, dtype)[batch]
    x.requires_grad_()
    with fastattn.batch_invariant(switch):
        y = op(x)
    (dx,) = torch.autograd.grad(y, x, down[..., : y.shape[-1]].to(y.dtype))
    return y.detach()[place].reshape(-1, y.shape[-1]), dx[place].reshape(-1, columns)


@pytest.mark.kernels
@pytest.mark.usefixtures("products_by_element")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "wide" in name else []) for name in OPS],
)
def test_a_sequence_has_the_same_bits_in_every_batch(name, dtype):
    y, dx = results(name, dtype, "alone", True)
    assert y.isfinite().all()
    assert dx.abs().max() > 0
    for batch in ("in a batch", "padded, at another place", "packed"):
        other_y, other_dx = results(name, dtype, batch, True)
        assert same_bits(other_y, y), batch
        assert same_bits(other_dx, dx), batch
    token_y, token_dx = results(name, dtype, "one token", True)
    assert same_bits(token_y, y[:1])
    assert same_bits(token_dx, dx[:1])


@pytest.mark.kernels
@pytest.mark.usefixtures("products_by_element")
@pytest.mark.skipif(not INTERPRETED, reason="cuBLAS may happen to agree")
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_depend_on_the_batch(name):
    # What the test above would not notice, were the switch without effect.
    alone = results(name, torch.float32, "alone", False)
    padded = results(name, torch.float32, "padded, at another place", False)
    assert not same_bits(alone[0], padded[0])


HOPPER = ("cuda", 90, 32, 132, 232_448)


@pytest.mark.parametrize("sizes", [(4096, 4096), (64, 8192), (24, FEATURES)])
def test_tiles_of_a_gpu_depend_on_features_alone(sizes):
    pytest.importorskip("triton")
    from fastattn.kernels.config import Target
    from fastattn.kernels.matmul.config import matmul_config
    from fastattn.kernels.matmul.gated_linear_config import gated_linear_config

    target = Target(*HOPPER)

    def configs(switch: bool) -> list[set[Any]]:
        """What products, in either direction of gated_linear too, get for few rows and for many."""
        rows = [(1, 1), (5, 1), (100, 1), (4096, 1), (70_000, 1), (128, 64)]
        kind = ("bfloat16", "ieee")
        return [
            {
                matmul_config(m, *sizes, batch, *kind, "kk", False, target, batch_invariant=switch)
                for m, batch in rows
            },
            *(
                {
                    gated_linear_config(m, *sizes, *kind, back, target, batch_invariant=switch)
                    for m, _ in rows
                }
                for back in (False, True)
            ),
        ]

    for ordinary, invariant in zip(configs(False), configs(True), strict=True):
        assert len(ordinary) > 1
        (config,) = invariant
        assert getattr(config, "splits", 1) == 1
        assert config.block_m >= 64


@pytest.mark.kernels
@pytest.mark.usefixtures("products_by_element")
def test_matrices_of_a_batch():
    a, b = random(3, 7, FEATURES), random(3, FEATURES, 9, seed=1)
    down = random(3, 7, 9, seed=2)

    def outputs(part: slice) -> list[torch.Tensor]:
        leaves = [x[part].clone().requires_grad_() for x in (a, b)]
        with fastattn.batch_invariant():
            out = fastattn.matmul(*leaves)
        return [out, *torch.autograd.grad(out, leaves, down[part])]

    for alone, among in zip(outputs(slice(1, 2)), outputs(slice(None)), strict=True):
        assert same_bits(alone[0], among[1])


class Switches(TorchDispatchMode):
    """Notes what the launchers of products are told."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        if "batch_invariant" in names:
            told = args[names.index("batch_invariant")]
            self.found.append((func.overloadpacket.__name__, told))
        return func(*args, **(kwargs or {}))


@pytest.mark.kernels
@pytest.mark.parametrize("forward", [False, True])
def test_a_backward_goes_by_its_forward(forward):
    x, weight, bias = random(3, 8), random(4, 8), random(4)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def model() -> torch.Tensor:
        y = fastattn.linear(*leaves, activation="gelu")
        y = fastattn.gated_linear(y, leaves[1].t().tanh(), leaves[1].t().sigmoid())
        y = fastattn.matmul(y, leaves[1].t())
        target = torch.zeros(3, dtype=torch.int64, device=x.device)
        return fastattn.linear_cross_entropy(y, leaves[1].t(), target, reduction="none")

    found: list[tuple[str, bool]] = []

    def backward() -> None:
        with Switches() as switches:
            loss.sum().backward()
        found.extend(switches.found)

    # As a GPU chooses, plain products would be torch's.
    kernels = fastattn.backend("triton")
    with Switches() as switches, kernels, fastattn.batch_invariant(forward):
        loss = model()
    found += switches.found
    # The switch belongs to a thread, and a backward may run in another one.
    with fastattn.batch_invariant(not forward):
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert {name for name, _ in found} == {
        "gated_linear_backward",
        "gated_linear_forward",
        "linear_forward",
        "matmul_forward",
    }
    # The gradient of a weight that all rows share is a sum over the batch.
    shared = [told for name, told in found if name == "matmul_forward"]
    assert shared == [forward, forward, False]
    assert {told for name, told in found if name != "matmul_forward"} == {forward}
    assert leaves[2].grad is not None


@pytest.mark.kernels
def test_compiled_code_heeds_the_switch():
    told: list[list[bool]] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable:
        nodes = [n for n in module.graph.nodes if "linear_forward" in str(n.target)]
        told.append([node.args[-1] for node in nodes])
        return module.forward

    def model(x: torch.Tensor) -> torch.Tensor:
        y = fastattn.linear(x, weight)
        with fastattn.batch_invariant():
            return y + fastattn.linear(x, weight)

    torch.compiler.reset()
    x, weight = random(TOKENS, FEATURES), random(24, FEATURES, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with fastattn.backend("triton"):
        assert same_bits(compiled(x), model(x))
        with fastattn.batch_invariant():
            assert same_bits(compiled(x), model(x))
        compiled(x)
    assert told == [[False, True], [True, True]]


@pytest.mark.kernels
@pytest.mark.usefixtures("products_by_element")
def test_compiled_gradients_have_the_same_bits():
    torch.compiler.reset()
    weight = random(24, FEATURES, seed=1)

    def model(x: torch.Tensor) -> torch.Tensor:
        return fastattn.linear(x, weight, activation="gelu")

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    rows = random(40, FEATURES)
    found = []
    for function, count in ((model, TOKENS), (compiled, TOKENS), (compiled, 40)):
        x = rows[:count].clone().requires_grad_()
        with fastattn.batch_invariant():
            y = function(x)
        found.append((y[:TOKENS], torch.autograd.grad(y.sum(), x)[0][:TOKENS]))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_how_it_can_be_used():
    switch = fastattn.batch_invariant()
    assert not is_batch_invariant()
    with switch, switch:
        assert is_batch_invariant()
        with fastattn.batch_invariant(False):
            assert not is_batch_invariant()
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(is_batch_invariant()))
        thread.start()
        thread.join()
        assert seen == [False]
    assert not is_batch_invariant()

    @fastattn.batch_invariant()
    def decorated() -> bool:
        return is_batch_invariant()

    assert decorated()
    assert not is_batch_invariant()
    with pytest.raises(ZeroDivisionError), switch:
        raise ZeroDivisionError
    assert not is_batch_invariant()


@pytest.mark.parametrize("enabled", [None, 1, "on"])
def test_bad_values(enabled):
    with pytest.raises(TypeError, match="batch_invariant: enabled must be a bool, got"):
        fastattn.batch_invariant(enabled)


def test_the_reference_takes_it_without_effect():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with fastattn.backend("reference"):
        expected = fastattn.linear(x, weight)
        with fastattn.batch_invariant():
            assert same_bits(fastattn.linear(x, weight), expected)


LENGTHS = (37, 64, 21)


def sequences(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """q, k, v and an incoming gradient (1, H, length, 16) of sequences of LENGTHS."""
    torch.manual_seed(0)
    return [
        [torch.randn(1, heads, length, 16).to(DEVICE, dtype) for heads in (2, 1, 1, 2)]
        for length in LENGTHS
    ]


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, function: Any, **options
) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with fastattn.batch_invariant():
        o = function(*leaves, **options)
    return [o, *torch.autograd.grad(o, leaves, do)]


def padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    """(B, H, longest, D), zeros behind the shorter ones."""
    longest = max(LENGTHS)
    return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in tensors])


@pytest.mark.kernels
@pytest.mark.parametrize("form", ["key lengths", "mask", "packed"])
@pytest.mark.parametrize("scores", [{}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sequence_alone_padded_and_packed_is_attended_alike(
    form, scores, dtype, products_by_element
):
    parts = sequences(dtype)
    # Padded queries stand behind all keys, so that only masks which do not count places fit.
    alone = [attended(*part, fastattn.attention, **scores) for part in parts]
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    if form == "packed":
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()

        def packed(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
            tensors = tuple(x[0].transpose(0, 1) for x in tensors)
            longest = max(LENGTHS)
            o = fastattn.attention_varlen(*tensors, ends, ends, longest, longest, **options)
            return o.transpose(0, 1)[None]

        together = attended(
            *(torch.cat(column, 2) for column in zip(*parts, strict=True)), packed, **scores
        )
        found = zip(*(x.split(LENGTHS, 2) for x in together), strict=True)
    else:
        n = torch.arange(max(LENGTHS), device=DEVICE)
        options = (
            {"kv_lengths": lengths}
            if form == "key lengths"
            else {"mask": (n < lengths[:, None])[:, None, None]}
        )
        columns = [padded(list(column)) for column in zip(*parts, strict=True)]
        together = attended(*columns, fastattn.attention, **options, **scores)
        found = (
            [x[place : place + 1, :, :length] for x in together]
            for place, length in enumerate(LENGTHS)
        )
    for own, expected in zip(found, alone, strict=True):
        for name, one, other in zip(("o", "dq", "dk", "dv"), own, expected, strict=True):
            assert same_bits(one.contiguous(), other.contiguous()), name


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_order_of_keys_in_a_tile_shows_in_no_sum(dtype, products_by_element):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 16, 16).to(DEVICE, dtype) for _ in range(2))
    order = torch.randperm(16, device=DEVICE)

    def log_sums(k: torch.Tensor, switch: bool) -> torch.Tensor:
        with fastattn.batch_invariant(switch):
            return fastattn.attention(q, k, k, return_lse=True)[1]

    lse = log_sums(k, True)
    assert same_bits(log_sums(k[:, :, order], True), lse)
    assert not same_bits(log_sums(k[:, :, order], False), log_sums(k, False))
    scores = q.double() @ k.double().mT / 4
    exact = scores.logsumexp(-1)
    # To half a unit in the last place of the sum and of its logarithm, and of the scores.
    assert (lse - exact).abs().max() < 2.0**-22 * scores.abs().max().clamp(min=4.0)


def test_masks_have_the_tiles_that_no_mask_has():
    """On a GPU they differ without the switch, which is what it is for."""
    target = Target("cuda", 90, 32, multiprocessors=132, shared_memory=232448)
    features = (128, 128, torch.bfloat16, "ieee")
    plain, masked = (
        attention_forward_config(*features, name, target) for name in ("plain", "tensor")
    )
    assert plain != masked
