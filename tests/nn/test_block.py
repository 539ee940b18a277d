"""TransformerBlock and its stack beside plain PyTorch and Hugging Face's layers."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_support import (
    assert_autocasts,
    assert_checkpoints,
    assert_compiles,
    assert_same_outcome,
    assert_survives_copies,
    assert_works_in_16_bits,
    causal,
    numbers,
    outcome,
    place,
    plain_module,
    rms_norm,
)
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.nn as nn
from fastattn.ops.core.backends import INTERPRETED
from support import WIDEST, assert_close, same_bits

kernels = pytest.mark.kernels

COLUMNS, HEADS, LENGTH, CONTEXT = 16, 2, 7, 5
ORDERS = ("pre", "post", "sandwich")
every_order = pytest.mark.parametrize("order", ORDERS)

rms = partial(nn.RMSNorm, COLUMNS, eps=1e-6)
layer = partial(nn.LayerNorm, COLUMNS)


def block(order: Any = "pre", norm: Any = rms, cross: bool = False, **options: Any) -> Any:
    return nn.TransformerBlock(
        nn.Attention(COLUMNS, HEADS, causal=True),
        nn.GatedMLP(COLUMNS, 24),
        norm,
        order=order,
        cross_attn=nn.Attention(COLUMNS, HEADS) if cross else None,
        **options,
    )


def stack(order: Any = "pre", norm: Any = rms, cross: bool = False, **options: Any) -> Any:
    layers = (block(order, norm, cross, **options) for _ in range(2))
    return nn.TransformerStack(layers, norm())


def plain_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(norm, torch.nn.LayerNorm):
        return F.layer_norm(x, (COLUMNS,), norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, norm.eps)


def plain_block(module: Any, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
    """The block by its parameters, every addition and norm by itself."""

    def mlp(x: torch.Tensor) -> torch.Tensor:
        own = module.mlp
        gate, up = F.linear(x, own.gate_proj.weight), F.linear(x, own.up_proj.weight)
        return F.linear(F.silu(gate) * up, own.down_proj.weight)

    def attention(x: torch.Tensor) -> torch.Tensor:
        return plain_module(module.self_attn, x, keep=causal(LENGTH, LENGTH))

    def cross(x: torch.Tensor) -> torch.Tensor:
        return plain_module(module.cross_attn, x, context)

    def norm(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return partial(plain_norm, getattr(module, name))

    before = {
        attention: "input_layernorm",
        cross: "pre_cross_attn_layernorm",
        mlp: "post_attention_layernorm",
    }
    after = {
        attention: "post_attention_layernorm",
        cross: "post_cross_attn_layernorm",
        mlp: "post_feedforward_layernorm",
    }
    for own in (attention, mlp) if context is None else (attention, cross, mlp):
        if module.order == "pre":
            x = x + own(norm(before[own])(x))
        elif module.order == "post":
            x = norm(after[own])(x + own(x))
        else:
            name = "pre_feedforward_layernorm" if own is mlp else before[own]
            x = x + norm(after[own])(own(norm(name)(x)))
    return x


def plain_stack(module: Any, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
    for own in module.layers:
        x = plain_block(own, x, context)
    return plain_norm(module.norm, x)


def check(backend: Any, order: str, norm: Any, cross: bool) -> None:
    module = place(stack(order, norm, cross))
    x = numbers(2, LENGTH, COLUMNS)
    context = numbers(2, CONTEXT, COLUMNS) if cross else None
    tensors = {"x": x, **dict(module.named_parameters())}
    if context is not None:
        tensors["context"] = context
    assert_same_outcome(
        lambda: module(x, context), lambda: plain_stack(module, x, context), tensors, backend
    )


@kernels
@pytest.mark.parametrize("norm", [rms, layer], ids=["RMSNorm", "LayerNorm"])
@every_order
def test_kernels_agree_with_plain_pytorch(order, norm):
    check("triton", order, norm, cross=False)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("norm", [rms, layer], ids=["RMSNorm", "LayerNorm"])
@every_order
def test_reference_agrees_with_plain_pytorch(order, norm, cross):
    check("reference", order, norm, cross)


@kernels
@pytest.mark.slow
@every_order
def test_kernels_agree_with_plain_pytorch_beside_a_context(order):
    check("triton", order, rms, cross=True)


def gradient_penalty(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    return dx.square().mean()


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("triton", marks=[kernels, pytest.mark.slow], id="kernels"),
        pytest.param("reference", id="reference"),
    ],
)
def test_second_derivatives_are_those_of_plain_pytorch(backend):
    module = place(block("sandwich"))
    x = numbers(1, LENGTH, COLUMNS)
    assert_same_outcome(
        lambda: gradient_penalty(module, x),
        lambda: gradient_penalty(partial(plain_block, module), x),
        {"x": x, **dict(module.named_parameters())},
        backend,
    )


def fused_additions(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> int:
    """How many additions are fused with a norm in a call."""
    count = 0
    for name in ("add_rms_norm", "add_layer_norm"):
        op = getattr(fastattn.ops, name)

        def counted(*args: Any, op: Any = op, **options: Any) -> Any:
            nonlocal count
            count += 1
            return op(*args, **options)

        monkeypatch.setattr(fastattn.ops, name, counted)
    run()
    monkeypatch.undo()
    return count


@pytest.mark.parametrize(("order", "alone"), [("pre", 1), ("post", 2), ("sandwich", 1)])
@pytest.mark.parametrize("norm", [rms, layer, partial(torch.nn.LayerNorm, COLUMNS)])
def test_additions_are_fused_across_blocks(monkeypatch, order, alone, norm):
    module = stack(order, norm)
    x = torch.randn(2, LENGTH, COLUMNS)
    assert fused_additions(monkeypatch, lambda: module.layers[0](x)) == alone
    assert fused_additions(monkeypatch, lambda: module(x)) == 4


class OwnNorm(torch.nn.Module):
    """A norm of one's own, which knows how to add."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(COLUMNS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fastattn.rms_norm(x, self.weight, 1e-6, weight_offset=1.0)

    def add_norm(
        self, branch: torch.Tensor, residual: torch.Tensor, dropout_p: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fastattn.ops.add_rms_norm(
            branch, residual, self.weight, 1e-6, weight_offset=1.0, dropout_p=dropout_p
        )


def test_other_norms_fuse_if_they_say_how_and_are_called_if_not(monkeypatch):
    x = torch.randn(2, LENGTH, COLUMNS)
    own = stack(norm=OwnNorm)
    expected = own(x)
    assert fused_additions(monkeypatch, lambda: own(x)) == 4
    monkeypatch.delattr(OwnNorm, "add_norm")
    torch.testing.assert_close(own(x), expected)
    assert fused_additions(monkeypatch, lambda: own(x)) == 0


def test_a_norm_with_a_hook_is_called(monkeypatch):
    module = stack()
    x = torch.randn(2, LENGTH, COLUMNS)
    expected = module(x)
    seen = []
    for name, norm in module.named_modules():
        if "norm" in name:
            norm.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert fused_additions(monkeypatch, lambda: module(x)) == 0
    assert len(seen) == 5
    torch.testing.assert_close(module(x), expected)


@every_order
def test_a_block_alone_and_pairs_in_place_of_a_tensor(order):
    module = place(block(order))
    x = numbers(1, LENGTH, COLUMNS)
    expected = module(x)
    assert_close(expected, plain_block(module, x))
    for pair in ((x, None), (0.25 * x, 0.75 * x)):
        branch, residual = module(pair)
        assert (residual is None) is (order == "post")
        assert_close(branch if residual is None else branch + residual, expected)


@every_order
def test_a_float32_stream_under_autocast_keeps_its_dtype(order):
    module = stack(order)
    streams = []
    for own in module.layers:
        own.register_forward_hook(lambda _, args, out: streams.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.randn(2, LENGTH, COLUMNS))
        alone = module.layers[0](torch.randn(2, LENGTH, COLUMNS))
    for branch, residual in streams[:2]:
        kept = branch if residual is None else residual
        assert kept.dtype is torch.float32
    assert alone.dtype is torch.float32


@pytest.mark.parametrize("alone", [True, False])
@every_order
def test_dropout_is_of_what_layers_give(order, alone):
    """What is dropped is 0 or twice itself, in training alone; each layer's is dropped once."""
    made = block(order, dropout=0.5)
    x = torch.randn(3, 50, COLUMNS)
    # Layers that give ones make what is dropped plain to see.
    made.self_attn, made.mlp = Ones(), Ones()
    for norm in ("post_attention_layernorm", "post_feedforward_layernorm", "input_layernorm"):
        if hasattr(made, norm):
            setattr(made, norm, torch.nn.Identity())
    if order == "sandwich":
        made.pre_feedforward_layernorm = torch.nn.Identity()

    def added() -> torch.Tensor:
        if alone:
            return made(x) - x
        branch, residual = made((x, None))
        return (branch if residual is None else branch + residual) - x

    made.eval()
    torch.testing.assert_close(added(), torch.full_like(x, 2.0))
    made.train()
    found = added()
    for value, share in ((0.0, 0.25), (2.0, 0.5), (4.0, 0.25)):
        assert abs(((found - value).abs() < 1e-5).float().mean() - share) < 0.04


class Ones(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def test_any_attention_and_any_mlp():
    mixed = nn.TransformerStack(
        [
            nn.TransformerBlock(
                nn.LatentAttention(
                    COLUMNS,
                    HEADS,
                    kv_lora_rank=8,
                    qk_nope_head_dim=4,
                    qk_rope_head_dim=4,
                    v_head_dim=6,
                ),
                torch.nn.Sequential(torch.nn.Linear(COLUMNS, COLUMNS), torch.nn.Tanh()),
                rms,
            ),
            nn.TransformerBlock(
                nn.Attention(COLUMNS, HEADS, head_dim=4), nn.MLP(COLUMNS, 24), layer
            ),
        ]
    )
    x = torch.randn(2, LENGTH, COLUMNS)
    y = mixed(x, rotary=nn.RotaryEmbedding(4).tables(LENGTH))
    assert y.shape == x.shape
    assert y.isfinite().all()


class TestHuggingFace:
    """Checkpoints of whole layers load by name, and give the same."""

    @pytest.fixture(autouse=True)
    def transformers(self):
        if INTERPRETED:
            pytest.skip("compares the reference backend")
        return pytest.importorskip("transformers")

    def compare(self, theirs: Any, ours: Any) -> None:
        theirs = theirs.to(WIDEST).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        ours = ours.to(WIDEST)
        assert ours.load_state_dict(theirs.state_dict()) == ([], [])
        x = numbers(2, LENGTH, COLUMNS)
        cos, sin = nn.RotaryEmbedding(8).tables(LENGTH)
        twice = tuple(torch.cat((table, table), -1)[None].to(WIDEST) for table in (cos, sin))
        mask = torch.zeros(LENGTH, LENGTH, dtype=WIDEST)
        mask = mask.masked_fill(~causal(LENGTH, LENGTH), float("-inf"))[None, None]

        def expected() -> torch.Tensor:
            y = theirs(x, position_embeddings=twice, attention_mask=mask)
            return y[0] if isinstance(y, tuple) else y

        found = outcome(
            lambda: ours(x, rotary=(cos, sin)), {"x": x, **dict(ours.named_parameters())}
        )
        for name, one in outcome(expected, {"x": x, **dict(theirs.named_parameters())}).items():
            assert_close(found[name], one, name)

    SIZES = staticmethod(
        lambda: {
            "hidden_size": COLUMNS,
            "intermediate_size": 24,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rms_norm_eps": 1e-6,
            "attn_implementation": "eager",
        }
    )

    def test_llama(self):
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        attention = nn.Attention(COLUMNS, HEADS, 1, causal=True)
        ours = nn.TransformerBlock(attention, nn.GatedMLP(COLUMNS, 24), rms)
        self.compare(LlamaDecoderLayer(LlamaConfig(**self.SIZES()), 0), ours)

    def test_gemma2(self):
        from transformers import Gemma2Config
        from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer

        config = Gemma2Config(**self.SIZES(), query_pre_attn_scalar=8)
        attention = nn.Attention(COLUMNS, HEADS, 1, causal=True, softcap=50.0)
        mlp = nn.GatedMLP(COLUMNS, 24, activation="gelu_tanh")
        ours = nn.TransformerBlock(attention, mlp, OwnNorm, order="sandwich")
        self.compare(Gemma2DecoderLayer(config, 0), ours)


def call(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x)


@every_order
def test_copies_and_round_trips(order):
    assert_survives_copies(lambda: stack(order), call, numbers(2, LENGTH, COLUMNS))


@kernels
@pytest.mark.slow
def test_compiles_without_graph_breaks():
    assert_compiles(place(stack()), call, numbers(1, LENGTH, COLUMNS))


@every_order
def test_compiles_without_graph_breaks_on_the_reference(order):
    with fastattn.backend("reference"):
        assert_compiles(place(stack(order)), call, numbers(2, LENGTH, COLUMNS))


def in_pieces(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Every block computed again in the backward by itself, pairs going in and out."""
    stream = (x, None)
    for own in module.layers:
        stream = checkpoint(own, stream, use_reentrant=False)
    return nn.add_norm(*stream, module.norm)[0]


@every_order
def test_checkpointing(order):
    module = place(stack(order, dropout=0.3))
    x = numbers(2, LENGTH, COLUMNS)
    assert_checkpoints(module, call, x)
    tensors = {"x": x, **dict(module.named_parameters())}
    torch.manual_seed(1)
    expected = outcome(lambda: module(x), tensors)
    torch.manual_seed(1)
    for name, found in outcome(lambda: in_pieces(module, x), tensors).items():
        assert same_bits(found, expected[name]), name


def test_16_bits():
    assert_works_in_16_bits(place(stack()), call, numbers(2, LENGTH, COLUMNS))


@every_order
def test_autocast(order):
    assert_autocasts(place(stack(order)), call, numbers(2, LENGTH, COLUMNS))


def test_nothing_changes_the_modules_given():
    attention, mlp = nn.Attention(COLUMNS, HEADS), nn.GatedMLP(COLUMNS, 24)
    kept = copy.deepcopy((attention, mlp))
    made: Any = nn.TransformerBlock(attention, mlp, rms)
    assert made.self_attn is attention
    assert made.mlp is mlp
    for module, one in zip((attention, mlp), kept, strict=True):
        for a, b in zip(module.parameters(), one.parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(made.input_layernorm.weight, torch.ones(COLUMNS))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"order must be one of pre, post, sandwich, got 'before'"):
        block("before")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1\.5"):
        block(dropout=1.5)
    x = torch.randn(2, LENGTH, COLUMNS)
    for module, context in ((block(), x), (block(cross=True), None)):
        with pytest.raises(ValueError, match="a context is needed where there is cross_attn"):
            module(x, context)
