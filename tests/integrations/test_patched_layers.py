"""Rotary positions and sums with a norm after them: which are known, and what they compute."""

import functools
import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import fastattn
from against_unpatched import breaches, gradients_of, measure
from families import FAMILIES, make_model, tokens
from fastattn import ops
from fastattn.checking import Results
from fastattn.integrations.transformers.rotary import find_form, make_rotation
from fastattn.integrations.transformers.sums import find_sum
from fastattn.ops.core.backends import INTERPRETED
from fastattn.patching import added_norms
from fastattn.patching.texts import read_text, write_forward
from support import count_launches, same_bits

reference_only = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")

FUNCTIONS = {
    ("llama", "apply_rotary_pos_emb"): (False, "halves", False, False),
    ("cohere2", "apply_rotary_pos_emb"): (True, "pairs", False, False),
    ("glm4", "apply_rotary_pos_emb"): (True, "halves", False, True),
    ("gpt_oss", "apply_rotary_pos_emb"): (False, "half", False, False),
    ("deepseek_v3", "apply_rotary_pos_emb_interleave"): (False, "halves", True, False),
    ("qwen2_vl", "apply_rotary_pos_emb_vision"): (False, "halves", False, False),
    # Complex numbers; tables that come in another order.
    ("llama4", "apply_rotary_emb"): None,
    ("gptj", "apply_rotary_pos_emb"): None,
}


@reference_only
@pytest.mark.parametrize("place", FUNCTIONS, ids=lambda place: place[0])
def test_forms_of_rotary_functions(place: tuple[str, str]):
    family, name = place
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    form = find_form(getattr(module, name))
    found = form and (form.interleaved, form.tables, form.regrouped, form.partial)
    assert found == FUNCTIONS[place]


def backwards(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """Turns the other way."""
    return apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)


def rounded(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """Gives float32 with the bits of 16."""
    turned = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    return tuple(x.bfloat16().to(x.dtype) for x in turned)


def without_gradient(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """Has no gradient of keys."""
    return apply_rotary_pos_emb(q, k.detach(), cos, sin, unsqueeze_dim)


@reference_only
@pytest.mark.parametrize("function", [backwards, rounded, without_gradient])
def test_what_only_looks_like_one_has_no_form(function: Any):
    assert find_form(function) is None


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(shape).to(dtype)


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines of random angles, each twice."""
    angles = torch.rand(*shape[:-1], shape[-1] // 2) * 6.0
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


OURS: dict[str, tuple[Any, ...]] = {
    "heads": (heads(2, 4, 5, 8), heads(2, 2, 5, 8), *tables(2, 5, 8)),
    "one row of tables": (heads(2, 4, 5, 8), heads(2, 2, 5, 8), *tables(1, 5, 8)),
    "as many tokens as heads": (heads(2, 4, 4, 8), heads(2, 4, 4, 8), *tables(2, 4, 8)),
    "packed": (heads(5, 4, 8), heads(5, 4, 8), *tables(5, 8)),
}
THEIRS: dict[str, tuple[Any, ...]] = {
    "float64": tuple(x.double() for x in OURS["heads"]),
    "tables that learn": (*OURS["heads"][:2], *(x.requires_grad_() for x in tables(2, 5, 8))),
    "an axis more": (heads(1, 2, 4, 5, 8), heads(1, 2, 2, 5, 8), *tables(1, 5, 8)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@reference_only
@pytest.mark.parametrize("tokens_first", [False, True], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OURS)
def test_a_rotation_keeps_dtypes_and_layouts(
    case: str, dtype: torch.dtype, table: torch.dtype, tokens_first: bool,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    q, k, cos, sin = OURS[case]
    given = [q.to(dtype), k.to(dtype), cos.to(table), sin.to(table)]
    options = {}
    if tokens_first and q.dim() == 4:
        given[:2] = [x.transpose(1, 2) for x in given[:2]]
        options = {"unsqueeze_dim": 2}
    calls = counted(monkeypatch, "apply_rotary_qk")
    form = find_form(apply_rotary_pos_emb)
    assert form is not None
    calls.clear()
    turned = make_rotation(apply_rotary_pos_emb, form)(*given, **options)
    expected = apply_rotary_pos_emb(*given, **options)
    exact = apply_rotary_pos_emb(*(x.double() for x in given), **options)
    # bfloat16 beside float16 is no pair that is tried.
    assert len(calls) == (dtype is table or torch.float32 in (dtype, table))
    for a, b, truth in zip(turned, expected, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        error, allowed = ((x.double() - truth).abs().max() for x in (a, b))
        assert error <= allowed + torch.finfo(b.dtype).eps * truth.abs().max()


@reference_only
@pytest.mark.parametrize("case", THEIRS)
def test_other_calls_go_to_their_function(case: str, monkeypatch: pytest.MonkeyPatch):
    form = find_form(apply_rotary_pos_emb)
    assert form is not None
    calls = counted(monkeypatch, "apply_rotary_qk")
    given = THEIRS[case]
    turned = make_rotation(apply_rotary_pos_emb, form)(*given)
    assert calls == []
    assert all(map(torch.equal, turned, apply_rotary_pos_emb(*given)))


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """A list that has the names of ops that are called from now on."""
    calls: list[str] = []

    def count(name: str, op: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return op(*args, **kwargs)

    for name in names:
        monkeypatch.setattr(ops, name, functools.partial(count, name, getattr(ops, name)))
    return calls


class Layer(nn.Module):
    """A layer with two norms and a branch, whose forward its subclasses have."""

    def __init__(self, norm: Any = LlamaRMSNorm) -> None:
        super().__init__()
        self.norm, self.last = norm(8), norm(8)
        self.branch, self.act = nn.Linear(8, 8), nn.GELU()


class AsLlama(Layer):
    """The residual stream has a name of its own."""

    def forward(self, hidden: Any, scale: float = 0.5, *, times: int = 1) -> Any:
        residual = hidden
        for _ in range(times):
            hidden = self.branch(hidden) * scale
            # A comment in between.
            hidden = residual + hidden
            residual = hidden
            hidden = self.norm(hidden)
        return residual + self.act(hidden)


class AsViT(Layer):
    """The sum keeps its name."""

    def forward(self, hidden: Any) -> Any:
        if hidden is not None:
            hidden = self.branch(hidden) + hidden
            output = self.norm(hidden)
            output = output + hidden
        return output


class AsBert(Layer):
    """The sum has no name."""

    def forward(self, hidden: Any, other: Any = None) -> Any:
        return self.last(self.branch(hidden) + (hidden if other is None else other))


class WithoutAName(Layer):
    """The normalized sum takes its name."""

    def forward(self, hidden: Any) -> Any:
        hidden = self.branch(hidden) + hidden
        hidden = self.last(hidden)
        return hidden.sum(-1)


class OfThreeNames(Layer):
    """The sum has two names, and the norm's result a third."""

    def forward(self, hidden: Any) -> Any:
        total = hidden + self.branch(hidden)
        kept = total
        normal = self.norm(total)
        return normal * kept - total


KNOWN = [AsLlama, AsViT, AsBert, WithoutAName, OfThreeNames]


@reference_only
@pytest.mark.parametrize("norm", [LlamaRMSNorm, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("kind", KNOWN)
def test_sums(kind: type[Layer], norm: Any, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer, x = kind(norm), torch.randn(3, 8)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)

    def run(model: Any) -> Results:
        model.zero_grad()
        rows = x.clone().to(model.branch.weight.dtype).requires_grad_()
        output = model(rows)
        (output * torch.linspace(-1.0, 2.0, output.numel()).view_as(output)).sum().backward()
        assert rows.grad is not None
        return {"output": output.detach(), "drows": rows.grad, **gradients_of(model)}

    measured, expected = measure(layer, run, neighbours=4), layer(x)
    signature = inspect.signature(layer.forward)

    rule = find_sum(layer, kind)
    assert isinstance(rule, fastattn.patching.Rule)
    fastattn.patch(layer, mlp=False, rules=[rule])
    assert inspect.signature(layer.forward) == signature
    calls = counted(monkeypatch, "add_rms_norm", "add_layer_norm")
    assert breaches(run(layer), measured) == []
    assert calls == ["add_layer_norm" if norm is nn.LayerNorm else "add_rms_norm"]

    seen = []
    part = layer.norm if kind in (AsLlama, AsViT, OfThreeNames) else layer.last
    part.register_forward_hook(lambda *_: seen.append(True))
    calls.clear()
    layer(x)
    assert (seen, calls) == ([True], [])

    fastattn.unpatch(layer)
    assert type(layer) is kind
    assert same_bits(layer(x), expected)


@reference_only
def test_arguments_of_a_forward_made_anew():
    layer = AsLlama()
    rule = find_sum(layer, AsLlama)
    assert isinstance(rule, fastattn.patching.Rule)
    x = torch.randn(3, 8)
    expected = [layer(x), layer(x, 0.25), layer(x, times=2)]
    fastattn.patch(layer, norms=False, mlp=False, rules=[rule])
    assert all(map(same_bits, [layer(x), layer(x, 0.25), layer(x, times=2)], expected))
    assert layer.forward.__func__.__globals__ is globals()
    assert "_fastattn_add_and_norm" not in globals()


class Otherwise(Layer):
    """A sum that is used in between, an activation, and a norm of something else."""

    def forward(self, hidden: Any) -> Any:
        total = self.branch(hidden) + hidden
        other = self.act(total)
        normal = self.norm(total)
        return self.act(hidden + normal) + self.last(hidden * 2.0) + other


class WithSuper(AsBert):
    """Its text cannot be made anew, for it has a cell."""

    def forward(self, hidden: Any, other: Any = None) -> Any:
        return self.norm(super().forward(hidden) + hidden)


def test_what_is_no_sum_before_a_norm():
    assert find_sum(Otherwise(), Otherwise) is None
    assert find_sum(WithSuper(), WithSuper) is None
    made: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.norm(self.branch(x) + x)", made)
    kind = type("WithoutText", (Layer,), made)
    assert find_sum(kind(), kind) is None


def test_a_wrapper_that_does_not_hold_what_it_wraps():
    def wrapper(*args: Any) -> Any:
        return args

    definition = read_text(AsViT.forward)
    assert definition is not None
    wrapper.__wrapped__ = AsViT.forward  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="does not hold what it wraps"):
        write_forward(wrapper, definition, {})


@reference_only
@pytest.mark.parametrize("other", [torch.randn(1, 8), 1.0, torch.randn(3, 8).double()])
def test_sums_that_are_no_kernels(other: Any, monkeypatch: pytest.MonkeyPatch):
    layer, x = AsBert(), torch.randn(3, 8)
    rule = find_sum(layer, AsBert)
    assert isinstance(rule, fastattn.patching.Rule)
    fastattn.patch(layer, rules=[rule])
    calls = counted(monkeypatch, "add_rms_norm")
    found = added_norms.add_and_norm(x, other, layer.norm)
    assert calls == []
    assert same_bits(found[1], x + other)
    assert same_bits(found[0], layer.norm(x + other))


@reference_only
def test_a_stream_in_float32_beside_branches_of_16_bits(monkeypatch: pytest.MonkeyPatch):
    """As autocast makes them."""
    for name in ("llama", "gemma2", "t5"):
        model = make_model(FAMILIES[name])
        fastattn.patch(model)
        norm = next(m for m in model.modules() if "Norm" in type(m).__name__)
        width = norm.weight.numel()
        a, b = torch.randn(3, width).bfloat16(), torch.randn(3, width)
        expected = norm(a + b), a + b
        calls = counted(monkeypatch, "add_rms_norm")
        for pair in ((a, b), (b, a)):
            for x, y in zip(added_norms.add_and_norm(*pair, norm), expected, strict=True):
                assert same_bits(x, y)
        assert len(calls) == 2


@pytest.mark.kernels
def test_kernels_are_launched():
    model = make_model(FAMILIES["llama"])
    fastattn.patch(model)
    with count_launches() as launches:
        model(tokens(), use_cache=False)
    # The first norm of each layer and the last one are alone; the others come with their sums.
    assert sum("rotary" in name for name in launches) == 2
    assert sum("norm_forward" in name for name in launches) == 5
