"""LatentAttention beside Hugging Face's DeepseekV3Attention, both ways of computing it."""

from typing import Any

import pytest
import torch
from block_support import (
    assert_autocasts,
    assert_checkpoints,
    assert_compiles,
    assert_survives_copies,
    assert_works_in_16_bits,
    causal,
    numbers,
    outcome,
    place,
)

import fastattn
import fastattn.nn as nn
from support import DEVICE, WIDEST, assert_close

kernels = pytest.mark.kernels

COLUMNS, HEADS, LENGTH = 24, 3, 7
SIZES: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}


def theirs(q_lora_rank: int | None, bias: bool, interleaved: bool) -> Any:
    pytest.importorskip("transformers")
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(
        hidden_size=COLUMNS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=q_lora_rank,
        attention_bias=bias,
        rope_interleave=interleaved,
        # Their own computes the softmax in float32, also of float64.
        attn_implementation="sdpa",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
        },
        **SIZES,
    )
    made = DeepseekV3Attention(config, 0)
    # Their norms compute in float32, also what is float64.
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norm = getattr(made, name)
        if norm is not None:
            setattr(made, name, torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon))
    return place(made)


def tables(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    return nn.RotaryEmbedding(4, base=100.0).tables(length, device=DEVICE or "cpu")


def ours(**options: Any) -> nn.LatentAttention:
    return nn.LatentAttention(COLUMNS, HEADS, **SIZES, **options)


def compare(
    backend: Any, q_lora_rank: int | None, bias: bool, interleaved: bool, absorbed: bool
) -> None:
    their = theirs(q_lora_rank, bias, interleaved)
    own = ours(q_lora_rank=q_lora_rank, bias=bias, interleaved=interleaved, scale=their.scaling)
    own = own.to(DEVICE or "cpu", WIDEST)
    assert own.load_state_dict(their.state_dict()) == ([], [])
    x = numbers(2, LENGTH, COLUMNS)
    cos, sin = tables()
    twice = tuple(torch.cat((table, table), -1)[None].to(WIDEST) for table in (cos, sin))
    mask = torch.zeros(LENGTH, LENGTH, dtype=WIDEST, device=x.device)
    mask = mask.masked_fill(~causal(LENGTH, LENGTH), float("-inf"))[None, None]

    with fastattn.backend(backend):
        found = outcome(
            lambda: own(x, rotary=(cos, sin), absorbed=absorbed),
            {"x": x, **dict(own.named_parameters())},
        )
    expected = outcome(lambda: their(x, twice, mask)[0], {"x": x, **dict(their.named_parameters())})
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert_close(found[name], one, name)


VARIANTS = [
    pytest.param(12, False, True, False, id="V3"),
    pytest.param(None, True, True, False, id="V2 Lite, biases"),
    pytest.param(12, True, False, False, id="halves"),
    pytest.param(12, False, True, True, id="absorbed"),
]


@kernels
@pytest.mark.parametrize(("q_lora_rank", "bias", "interleaved", "absorbed"), VARIANTS)
def test_kernels_agree_with_deepseek(q_lora_rank, bias, interleaved, absorbed):
    compare("triton", q_lora_rank, bias, interleaved, absorbed)


@pytest.mark.parametrize(("q_lora_rank", "bias", "interleaved", "absorbed"), VARIANTS)
def test_reference_agrees_with_deepseek(q_lora_rank, bias, interleaved, absorbed):
    compare("reference", q_lora_rank, bias, interleaved, absorbed)


def complete(**options: Any) -> nn.LatentAttention:
    return ours(q_lora_rank=12, rotary=nn.RotaryEmbedding(4, 32, interleaved=True), **options)


class LatentCache:
    """Latents and rotary keys one after another; what it holds is all that decoding keeps."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def update(
        self, latent: torch.Tensor, k_rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = [latent, k_rope]
        if self.kept:
            new = [torch.cat((self.kept[place], new[place]), dim=2) for place in range(2)]
        self.kept = new
        return new[0], new[1]


@pytest.mark.parametrize("absorbed", [False, True])
def test_decoding_with_a_cache_gives_what_the_whole_sequence_gives(absorbed):
    module = place(complete())
    x = numbers(2, LENGTH, COLUMNS)
    cache = LatentCache()
    with torch.no_grad():
        parts = [
            module(x[:, start:end], positions=start, cache=cache, absorbed=absorbed)
            for start, end in ((0, 3), (3, 4), (4, LENGTH))
        ]
        assert_close(torch.cat(parts, dim=1), module(x))
    assert [tuple(kept.shape) for kept in cache.kept] == [(2, 1, LENGTH, 16), (2, 1, LENGTH, 4)]


def test_terms_reach_attention():
    module = place(complete(causal=False))
    x = numbers(2, LENGTH, COLUMNS)
    lengths = torch.tensor([3, LENGTH], device=x.device)
    y = module(x, kv_lengths=lengths)
    assert_close(y[:1], module(x[:1], mask=torch.arange(LENGTH, device=x.device) < 3))
    assert_close(module(x[:1, :3])[0], y[0, :3])


def call(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def absorbing(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x, absorbed=True)


def test_copies_and_round_trips():
    assert_survives_copies(complete, call, numbers(2, LENGTH, COLUMNS))


@kernels
@pytest.mark.slow
@pytest.mark.parametrize("way", [call, absorbing])
def test_compiles_without_graph_breaks(way):
    assert_compiles(place(complete()), way, numbers(2, LENGTH, COLUMNS))


@pytest.mark.parametrize("way", [call, absorbing])
def test_compiles_without_graph_breaks_on_the_reference(way):
    with fastattn.backend("reference"):
        assert_compiles(place(complete()), way, numbers(2, LENGTH, COLUMNS))


@pytest.mark.parametrize("way", [call, absorbing])
def test_checkpointing(way):
    assert_checkpoints(place(complete(dropout=0.4)), way, numbers(2, LENGTH, COLUMNS))


def test_16_bits():
    assert_works_in_16_bits(place(complete()), call, numbers(2, LENGTH, COLUMNS))


@pytest.mark.parametrize("way", [call, absorbing])
def test_autocast(way):
    assert_autocasts(place(complete()), way, numbers(2, LENGTH, COLUMNS))


def test_everything_starts_as_torchs():
    torch.manual_seed(5)
    shapes = [(24, 12), (12, 30), (24, 20), (16, 48), (30, 24)]
    expected = [torch.nn.Linear(*shape, bias=False).weight for shape in shapes]
    torch.manual_seed(5)
    module = complete()
    names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    for name, weight in zip(names, expected, strict=True):
        assert torch.equal(getattr(module, name).weight, weight), name
    for norm in (module.q_a_layernorm, module.kv_a_layernorm):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert norm.eps == 1e-6


def test_dtype_and_device_reach_every_parameter():
    module = ours(q_lora_rank=12, bias=True, device="meta", dtype=torch.bfloat16)
    assert len(list(module.parameters())) == 10
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in module.parameters())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="qk_rope_head_dim must be even and positive, got 5"):
        nn.LatentAttention(COLUMNS, HEADS, **{**SIZES, "qk_rope_head_dim": 5})
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        complete(dropout=-0.1)
    x = torch.randn(2, LENGTH, COLUMNS)
    with pytest.raises(ValueError, match="rotary must be given"):
        ours()(x)
    module = complete()
    with pytest.raises(ValueError, match=r"x must be \(B, S, 24\), got the shape \(2, 7, 5\)"):
        module(x[..., :5])
    with pytest.raises(TypeError, match="LatentAttention: return_lse must not be given"):
        module(x, return_lse=True)
    module.kv_b_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="absorbed=True needs kv_b_proj to be a linear layer"):
        module(x, absorbed=True)
    # A bias, an adaptation and another class would be left out.
    biased = complete()
    biased.kv_b_proj = nn.Linear(biased.kv_b_proj.in_features, biased.kv_b_proj.out_features)
    adapted = complete()
    nn.apply_lora(adapted, "kv_b_proj", rank=2)
    for module in (biased, adapted):
        assert module(x).shape == x.shape
        with pytest.raises(ValueError, match=r"hooks of its own or a bias.*got (Lo|Li)"):
            module(x, absorbed=True)
