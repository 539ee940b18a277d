"""Random calls of every op: shapes, options that combine, and where the tensors lie in memory."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from attention_support import FEATURES, combined
from hypothesis import strategies as st
from memory_forms import FORMS, Form, filled

from fastattn import RelativeBias, alibi_slopes
from fastattn.ops.core.catalog import OPERATIONS, Normal, Sample, make_seed
from fastattn.ops.cross_entropy_samples import class_weights, targets
from fastattn.ops.grouped_linear import make_offsets
from fastattn.ops.linear_jsd import constant, two_of_three
from fastattn.ops.linear_top_k_kl import some_ids, some_log_probs
from fastattn.ops.mixture import make_ids
from fastattn.ops.softmax import make_mask

Draw = Callable[[st.SearchStrategy], Any]
Arguments = dict[str, Any]

# Hypothesis begins with the first of each, and of few examples that one should tell something.
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float16])
WIDTHS = st.sampled_from([130, 1, 2, 5, 16, 33, 64, 96, 257, 1030])
SIZES = st.sampled_from([70, 1, 8, 19, 32, 48, 96, 130])
ROWS = st.sampled_from([7, 1, 2, 16, 33, 40])


@dataclass(frozen=True)
class Layout:
    """A form of memory: dimensions in any order, with gaps between rows and numbers.

    Attributes:
        order: Which of the orders in which dimensions can follow each other.
        gaps: Numbers that are left out behind a row, a matrix and so on, innermost first.
        step: The innermost stride.
        offset: Numbers before the first.
        expanded: For each dimension whether all along it are one number in memory.
    """

    order: int
    gaps: tuple[int, ...]
    step: int
    offset: int
    expanded: tuple[bool, ...]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor so; numbers along what is expanded become those of its first element."""
        orders = list(itertools.permutations(range(tensor.dim())))
        order = orders[self.order % len(orders)]
        part = tensor
        if tensor.is_floating_point():
            for dim, expanded in zip(range(tensor.dim()), self.expanded, strict=False):
                part = part.narrow(dim, 0, 1) if expanded and tensor.shape[dim] > 1 else part
        strides, stride = [0] * part.dim(), self.step
        for dim, gap in zip(reversed(order), self.gaps, strict=False):
            strides[dim] = stride
            stride = stride * part.shape[dim] + gap
        memory = filled(tensor, self.offset + stride + 7)
        placed = memory.as_strided(part.shape, strides, self.offset)
        return placed.copy_(part).expand(tensor.shape)


def layouts() -> st.SearchStrategy[Form]:
    """Forms of memory, those with a name among them."""
    return st.one_of(
        st.builds(
            Layout,
            order=st.integers(0, 119),
            gaps=st.tuples(*[st.sampled_from([3, 0, 0, 0, 1, 16])] * 5),
            step=st.sampled_from([1, 1, 1, 2, 3]),
            offset=st.sampled_from([1, 0, 0, 2, 8, 16]),
            expanded=st.tuples(*[st.sampled_from([False] * 7 + [True])] * 5),
        ),
        st.sampled_from(["negated view", "imaginary part of a conjugate"]).map(_of_floats),
    )


def _of_floats(name: str) -> Form:
    return lambda tensor: FORMS[name](tensor) if tensor.is_floating_point() else tensor


def _leading(draw: Draw) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 7), max_size=2)))


def _maybe(draw: Draw, **arguments: Any) -> Arguments:
    """Some of these arguments."""
    return {name: value for name, value in arguments.items() if draw(st.booleans())}


def _dropout(draw: Draw, seed: str) -> Arguments:
    p = draw(st.sampled_from([0.0, 0.25, 0.9]))
    return {"dropout_p": p, seed: make_seed(draw(st.integers(0, 2**62)))} if p else {}


def _norm(draw: Draw, *, centered: bool, added: bool) -> Arguments:
    width = draw(WIDTHS)
    shape = (*_leading(draw), width)
    wide = draw(st.sampled_from([None, torch.float32]))
    arguments: Arguments = {"x": shape, "eps": draw(st.sampled_from([1e-6, 1e-3]))}
    arguments |= _maybe(draw, weight=Normal((width,), wide), bias=Normal((width,), wide))
    arguments |= _maybe(draw, out_dtype=torch.float32)
    if added:
        arguments |= {"residual": Normal(shape, draw(st.sampled_from([None, torch.float32])))}
        arguments |= _dropout(draw, "seed")
    if not centered and "weight" in arguments:
        arguments["casting"] = draw(st.sampled_from(["float32", "llama", "gemma", "t5"]))
        arguments["weight_offset"] = draw(st.sampled_from([0.0, 1.0]))
    return arguments


def _gated_norm(draw: Draw) -> Arguments:
    group, groups = draw(WIDTHS), draw(st.sampled_from([1, 2, 5]))
    shape = (*_leading(draw), group * groups)
    wide = draw(st.sampled_from([None, torch.float32]))
    arguments: Arguments = {"x": shape, "gate": Normal(shape, wide), "group_size": group}
    arguments |= {"eps": draw(st.sampled_from([1e-6, 1e-3])), "gate_first": draw(st.booleans())}
    arguments["casting"] = draw(st.sampled_from(["float32", "llama"]))
    more = {"weight": Normal(shape[-1:], wide), "out_dtype": torch.float32}
    return arguments | _maybe(draw, activation="sigmoid", **more)


def _modulated_norm(draw: Draw) -> Arguments:
    samples, cols = draw(st.integers(1, 5)), draw(WIDTHS)
    vector = Normal((samples, cols), draw(st.sampled_from([None, torch.float32])))
    arguments: Arguments = {"x": (samples, *_leading(draw), cols), "shift": vector, "scale": vector}
    return arguments | {"eps": draw(st.sampled_from([1e-6, 1e-3]))}


def _gate(draw: Draw, **options: st.SearchStrategy) -> Arguments:
    shape = (*_leading(draw), draw(WIDTHS))
    chosen = {name: draw(values) for name, values in options.items()}
    if draw(st.booleans()):
        return {"gate": shape, "up": shape, **chosen}
    packed = (*shape[:-1], 2 * shape[-1])
    return {"gate": packed, "interleaved": draw(st.booleans()), **chosen}


def _product(draw: Draw) -> Arguments:
    m, k, n = draw(ROWS), draw(SIZES), draw(SIZES)
    batches = [((), ()), ((3,), (3,)), ((2, 1), (1, 3)), ((2,), ()), ((), (2,))]
    of_a, of_b = draw(st.sampled_from(batches))
    return {"a": (*of_a, m, k), "b": (*of_b, k, n)}


def _linear(draw: Draw) -> Arguments:
    leading, features, out = (*_leading(draw), draw(ROWS)), draw(SIZES), draw(SIZES)
    activations = [None, "relu", "leaky_relu", "relu_squared", "gelu", "gelu_tanh", "silu", "tanh"]
    arguments = {"x": (*leading, features), "weight": (out, features)}
    more = _maybe(draw, bias=(out,), residual=(*leading, out))
    return {**arguments, **more, "activation": draw(st.sampled_from(activations))}


def _gated_linear(draw: Draw) -> Arguments:
    features, out = draw(SIZES), draw(SIZES)
    arguments: Arguments = {"x": (*_leading(draw), draw(ROWS), features)}
    arguments |= {"w_gate": (out, features), "w_up": (out, features)}
    arguments |= _maybe(draw, b_gate=(out,), b_up=(out,))
    activation = draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "sigmoid"]))
    clamped = _maybe(draw, limit=7.0, alpha=1.7) if activation == "silu" else {}
    return {**arguments, "activation": activation, **clamped}


def _grouped_linear(draw: Draw) -> Arguments:
    rows, features, out, experts = draw(ROWS), draw(SIZES), draw(SIZES), draw(st.integers(1, 5))
    places = st.lists(st.integers(0, rows), min_size=experts, max_size=experts)
    offsets = make_offsets(0, *sorted(draw(places)))
    transposed = draw(st.booleans())
    weight = (experts, features, out) if transposed else (experts, out, features)
    arguments: Arguments = {"x": (rows, features), "weight": weight, "offsets": offsets}
    return {**arguments, **_maybe(draw, bias=(experts, out)), "transposed": transposed}


def _mixture(draw: Draw) -> Arguments:
    leading = (*_leading(draw), draw(ROWS))
    hidden, inside, experts, slots = draw(SIZES), draw(SIZES), draw(st.integers(1, 5)), 2
    transposed, interleaved = draw(st.booleans()), draw(st.booleans())
    arguments: Arguments = {"x": (*leading, hidden), "weights": (*leading, slots)}
    arguments["ids"] = make_ids(experts + 1, *leading, slots)
    shapes = {"w_gate_up": (2 * inside, hidden), "w_down": (hidden, inside)}
    for name, shape in shapes.items():
        own = tuple(reversed(shape)) if transposed else shape
        arguments[name] = Normal((experts, *own), scale=0.3)
    arguments |= _maybe(draw, b_gate_up=(experts, 2 * inside), b_down=(experts, hidden))
    arguments |= _maybe(draw, recompute=True, limit=7.0, alpha=1.7, up_offset=1.0)
    return {**arguments, "transposed": transposed, "interleaved": interleaved}


def _loss(draw: Draw, rows: tuple[int, ...], classes: int, weight: str) -> Arguments:
    ignored = draw(st.sampled_from([None, 0, -1]))
    arguments: Arguments = {"target": targets(rows, classes, ignored if classes > 1 else None)}
    if ignored is not None and classes > 1:
        arguments["ignore_index"] = ignored
    arguments["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    arguments |= _maybe(draw, label_smoothing=0.1, z_loss=1e-2, softcap=5.0, return_lse=True)
    arguments |= _maybe(draw, logit_scale=0.7)
    return arguments | _maybe(draw, **{weight: class_weights(classes)})


def _cross_entropy(draw: Draw) -> Arguments:
    rows, classes = (*_leading(draw), draw(ROWS)), draw(WIDTHS)
    return {"logits": (*rows, classes), **_loss(draw, rows, classes, "weight")}


def _linear_cross_entropy(draw: Draw) -> Arguments:
    rows, features, classes = (draw(ROWS),), draw(SIZES), draw(SIZES)
    arguments: Arguments = {"x": (*rows, features), "weight": (classes, features)}
    arguments |= _maybe(draw, bias=(classes,), chunk_rows=7)
    return arguments | _loss(draw, rows, classes, "class_weight")


def _log_prob_options(draw: Draw, rows: tuple[int, ...], classes: int) -> Arguments:
    ignored = draw(st.sampled_from([None, 0]))
    arguments: Arguments = {"target": targets(rows, classes, ignored if classes > 1 else None)}
    if ignored is not None and classes > 1:
        arguments["ignore_index"] = ignored
    arguments |= _maybe(draw, temperature=0.6, softcap=5.0, logit_scale=0.7)
    return arguments | _maybe(draw, return_entropy=True)


def _log_prob(draw: Draw) -> Arguments:
    rows, classes = (*_leading(draw), draw(ROWS)), draw(WIDTHS)
    return {"logits": (*rows, classes), **_log_prob_options(draw, rows, classes)}


def _linear_log_prob(draw: Draw) -> Arguments:
    rows, features, classes = (draw(ROWS),), draw(SIZES), draw(SIZES)
    weight = Normal((classes, features), scale=features**-0.5)
    arguments: Arguments = {"x": (*rows, features), "weight": weight}
    arguments |= _maybe(draw, bias=(classes,), chunk_rows=7)
    return arguments | _log_prob_options(draw, rows, classes)


def _linear_jsd(draw: Draw) -> Arguments:
    rows, features, classes = draw(ROWS), draw(SIZES), draw(SIZES)
    weight = Normal((classes, features), scale=features**-0.5)
    arguments: Arguments = {"x": (rows, features), "weight": weight}
    arguments |= {"teacher_x": constant(rows, 8), "teacher_weight": constant(classes, 8)}
    arguments["beta"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
    mask = two_of_three(rows)
    return arguments | _maybe(draw, target_mask=mask, temperature=0.6, chunk_rows=7)


def _linear_top_k_kl(draw: Draw) -> Arguments:
    rows, features, classes = draw(ROWS), draw(SIZES), draw(SIZES)
    weight = Normal((classes, features), scale=features**-0.5)
    kept = draw(st.sampled_from([5, 1, 16]))
    arguments: Arguments = {"x": (rows, features), "weight": weight}
    arguments["teacher_ids"] = some_ids(rows, kept, classes=classes)
    arguments["teacher_log_probs"] = some_log_probs(rows, kept)
    mask = two_of_three(rows)
    return arguments | _maybe(
        draw, target_mask=mask, bias=(classes,), temperature=0.6, chunk_rows=7
    )


def _softmax(draw: Draw) -> Arguments:
    shape = (*_leading(draw), draw(ROWS), draw(WIDTHS))
    arguments: Arguments = {"x": shape, "scale": draw(st.sampled_from([1.0, 0.3]))}
    return arguments | _maybe(draw, causal=True, mask=make_mask(*shape), dtype=torch.float32)


def _angles(draw: Draw, batch: int, tokens: int, half: int) -> Arguments:
    shape = draw(st.sampled_from([(tokens + 5, half), (batch, tokens, half), (1, tokens, half)]))
    numbers = 0.7 * torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    arguments: Arguments = _maybe(draw, interleaved=True, inverse=True, full_width=True)
    if "full_width" in arguments and "interleaved" in arguments:
        numbers = numbers.repeat_interleave(2, -1)
    elif "full_width" in arguments:
        numbers = torch.cat((numbers, numbers), -1)
    arguments["cos"] = lambda device: numbers.cos().to(device)
    arguments["sin"] = lambda device: numbers.sin().to(device)
    if len(shape) == 2:
        places = torch.randint(tokens + 5, (batch, tokens))
        arguments |= _maybe(draw, positions=draw(st.sampled_from([3, lambda d: places.to(d)])))
    return arguments


def _rotary(draw: Draw, names: str) -> Arguments:
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    width = draw(st.sampled_from([4, 16, 37, 80]))
    half = draw(st.integers(1, width // 2))
    heads = {name: draw(st.integers(1, 5)) for name in names}
    tensors = {name: (batch, count, tokens, width) for name, count in heads.items()}
    return {**tensors, **_angles(draw, batch, tokens, half)}


@st.composite
def attention_calls(draw: Draw) -> tuple[list[str], dict[str, int]]:
    """Names of attention's features, and a shape for them, as `combined` takes them."""
    names = draw(st.lists(st.sampled_from(list(FEATURES)), unique=True, max_size=5))
    key_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    length = st.one_of(st.integers(0, 3), st.integers(15, 80))
    # Where each query sees one key, gradients cancel: test_attention_rounding.py has those.
    keys = length.filter(lambda count: count != 1)
    return names, {
        "batch": draw(st.integers(1, 2)),
        "heads": key_heads * group,
        "key_heads": key_heads,
        "queries": draw(length),
        "keys": draw(keys),
        "dim": draw(st.sampled_from([1, 8, 16, 20, 40])),
        "value_dim": draw(st.sampled_from([3, 16, 24])),
    }


def _as_argument(value: Any) -> Any:
    """What a sample has to be given for it to pass a value, or random numbers instead."""
    if isinstance(value, RelativeBias):
        value.table = value.table.detach().float()
    elif isinstance(value, torch.Tensor) and value.requires_grad:
        return Normal(tuple(value.shape))
    # As it is: a tuple of integers would be taken for a shape.
    return value if isinstance(value, bool | int | float) else lambda device: value


def _attention(draw: Draw) -> Arguments:
    names, shape = draw(attention_calls())
    tensors, options = combined(names, **shape)
    arguments = {name: _as_argument(value) for name, value in options.items()}
    named = zip("qkv", tensors, strict=True)
    return {name: tuple(x.shape) for name, x in named} | arguments | {"return_lse": True}


def _attention_weights(draw: Draw) -> Arguments:
    arguments = _attention(draw)
    for name in ("v", "return_lse", "sinks", "dropout_p", "dropout_seed"):
        arguments.pop(name, None)
    return {**arguments, "lse": Normal(arguments["q"][:3], torch.float32, mean=2.0)}


def _attention_varlen(draw: Draw) -> Arguments:
    lengths = draw(st.lists(st.tuples(*[st.integers(0, 40)] * 2), min_size=1, max_size=3))
    key_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    width, value_width, more = draw(st.sampled_from([(8, 8, 0), (16, 24, 3), (40, 16, 1)]))
    arguments: Arguments = {}
    for name, own in zip("qk", zip(*lengths, strict=True), strict=True):
        places = torch.tensor([0, *own]).cumsum(0).int()
        arguments[f"cu_seqlens_{name}"] = lambda device, places=places: places.to(device)
        arguments[f"max_seqlen_{name}"] = max(own)
        heads = key_heads * group if name == "q" else key_heads
        arguments[name] = (sum(own) + more, heads, width)
    arguments["v"] = (*arguments["k"][:2], value_width)
    heads = arguments["q"][1]
    slopes = alibi_slopes(heads)
    arguments |= _maybe(
        draw,
        causal=True,
        window=[9, 4],
        softcap=3.0,
        sinks=(heads,),
        scale=-0.3,
        alibi_slopes=lambda device: slopes.to(device),
    )
    return arguments | _dropout(draw, "dropout_seed") | {"return_lse": True}


def _decode_attention(draw: Draw) -> Arguments:
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    key_heads, group = draw(st.sampled_from([(1, 1), (1, 5), (2, 2), (1, 20)]))
    width, value_width = draw(st.sampled_from([(8, 8), (16, 24), (40, 16), (80, 64)]))
    page, pages = draw(st.sampled_from([(1, 40), (7, 9), (16, 3), (32, 2)]))
    room, heads = page * pages, key_heads * group
    lengths = draw(st.lists(st.integers(0, room), min_size=batch, max_size=batch))
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    arguments: Arguments = {
        "q": (batch, heads, queries, width),
        "lengths": lambda device: torch.tensor(lengths, dtype=kind, device=device),
    }
    cache = (batch, key_heads, room)
    if draw(st.booleans()):
        table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(room))
        arguments["block_table"] = lambda device: table.view(batch, pages).to(device, kind)
        cache = (batch * pages, key_heads, page)
    arguments["k"] = (*cache, width)
    if value_width < width and draw(st.booleans()):
        arguments["value_dim"] = value_width
    else:
        arguments["v"] = (*cache, value_width)
    slopes = alibi_slopes(heads)
    arguments |= _maybe(
        draw,
        causal=False,
        window=[9, 4],
        softcap=3.0,
        sinks=(heads,),
        scale=-0.3,
        alibi_slopes=lambda device: slopes.to(device),
    )
    return arguments | {"splits": draw(st.integers(1, 5)), "return_lse": True}


def _merge_attention(draw: Draw) -> Arguments:
    parts, leading = draw(st.integers(1, 40)), _leading(draw)
    return {
        "o": (parts, *leading, draw(WIDTHS)),
        "lse": Normal((parts, *leading), torch.float32, scale=3.0),
    }


def _log_softmax(draw: Draw) -> Arguments:
    return {"x": (*_leading(draw), draw(WIDTHS)), **_maybe(draw, dtype=torch.float32)}


def _drop(draw: Draw) -> Arguments:
    arguments: Arguments = {"x": (*_leading(draw), draw(WIDTHS))}
    arguments["seed"] = make_seed(draw(st.integers(0, 2**62)))
    return arguments | {"p": draw(st.sampled_from([0.1, 0.5]))}


def _swiglu(draw: Draw) -> Arguments:
    return _gate(draw) | _maybe(draw, limit=0.7, alpha=1.7, up_offset=1.0)


ARGUMENTS: Mapping[str, Callable[[Draw], Arguments]] = {
    "attention": _attention,
    "attention_varlen": _attention_varlen,
    "attention_weights": _attention_weights,
    "cross_entropy": _cross_entropy,
    "decode_attention": _decode_attention,
    "merge_attention": _merge_attention,
    "dropout": _drop,
    "swiglu": _swiglu,
    "geglu": lambda draw: _gate(draw, approximate=st.sampled_from(["none", "tanh"])),
    "reglu": _gate,
    "glu": _gate,
    "gated_linear": _gated_linear,
    "gated_rms_norm": _gated_norm,
    "grouped_linear": _grouped_linear,
    "layer_norm": lambda draw: _norm(draw, centered=True, added=False),
    "add_layer_norm": lambda draw: _norm(draw, centered=True, added=True),
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_jsd": _linear_jsd,
    "linear_log_prob": _linear_log_prob,
    "linear_top_k_kl": _linear_top_k_kl,
    "log_prob": _log_prob,
    "matmul": _product,
    "modulated_layer_norm": _modulated_norm,
    "modulated_rms_norm": _modulated_norm,
    "mixture": _mixture,
    "rms_norm": lambda draw: _norm(draw, centered=False, added=False),
    "add_rms_norm": lambda draw: _norm(draw, centered=False, added=True),
    "apply_rotary": lambda draw: _rotary(draw, "x"),
    "apply_rotary_qk": lambda draw: _rotary(draw, "qk"),
    "softmax": _softmax,
    "log_softmax": _log_softmax,
}
"""How the arguments of each op are drawn, as `Sample` takes them; of others there are samples.
"""


class Call(NamedTuple):
    """A call of an op: its arguments, their dtype, and where they and gradients lie in memory."""

    sample: Sample
    dtype: torch.dtype
    forms: dict[str, Form]
    gradient: Form


@st.composite
def calls(draw: Draw, name: str) -> Call:
    """Random calls of an op."""
    # What is drawn by PyTorch on the way follows from what is drawn here.
    torch.manual_seed(draw(st.integers(0, 2**20)))
    if name in ARGUMENTS:
        sample = Sample("random", **ARGUMENTS[name](draw))
    else:
        sample = draw(st.sampled_from(OPERATIONS[name].samples))
    forms = {argument: draw(layouts()) for argument in sample.arguments}
    return Call(sample, draw(DTYPES), forms, draw(layouts()))
