"""Hugging Face's checkpoints load into Attention by name, and give the same."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from block_support import causal, outcome

import fastattn.nn as nn
from fastattn.ops.core.backends import INTERPRETED
from support import assert_close

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")
transformers = pytest.importorskip("transformers")

LENGTH = 9
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "attn_implementation": "eager",
}
OURS = (32, 4, 2, 10)


def compare(
    theirs: Any,
    ours: nn.Attention,
    call: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    rotary: Any = None,
    rename: Callable[[str], str] = str,
) -> None:
    """Both on the same parameters; `call` takes theirs, x, and what is added to the scores."""
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    theirs, ours = theirs.double().eval(), ours.double().eval()
    state = {rename(name): tensor for name, tensor in theirs.state_dict().items()}
    assert ours.load_state_dict(state) == ([], [])

    x = torch.randn(2, LENGTH, 32, dtype=torch.float64, requires_grad=True)
    seen = causal(LENGTH, LENGTH, ours.window)
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=x.dtype).masked_fill(~seen, float("-inf"))
    found = outcome(lambda: ours(x, rotary=rotary), {"x": x, **dict(ours.named_parameters())})
    wanted = {"x": x} | {rename(name): tensor for name, tensor in theirs.named_parameters()}
    for name, expected in outcome(lambda: call(theirs, x, mask), wanted).items():
        assert_close(found[name], expected, name)


ANGLES = torch.arange(LENGTH)[:, None] / 100 ** (torch.arange(5) / 5)
TABLES = (ANGLES.cos(), ANGLES.sin())


def turned(columns: int) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Calls theirs with the tables as it wants them: in 5 columns, or with everything twice."""
    tables = tuple(x.double().repeat(1, columns // 5)[None] for x in TABLES)
    return lambda theirs, x, mask: theirs(x, position_embeddings=tables, attention_mask=mask)[0]


def test_llama():
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = transformers.LlamaConfig(**SIZES, attention_bias=True)
    ours = nn.Attention(*OURS, causal=True, bias=True)
    compare(LlamaAttention(config, 0), ours, turned(10), rotary=TABLES)


def test_qwen3():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    config = transformers.Qwen3Config(**SIZES)
    ours = nn.Attention(*OURS, causal=True, qk_norm=partial(nn.RMSNorm, eps=1e-6))
    compare(Qwen3Attention(config, 0), ours, turned(10), rotary=TABLES)


def test_gemma2():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

    config = transformers.Gemma2Config(
        **SIZES, sliding_window=4, attn_logit_softcapping=3.0, query_pre_attn_scalar=17
    )
    ours = nn.Attention(*OURS, causal=True, window=3, softcap=3.0, scale=17**-0.5)
    compare(Gemma2Attention(config, 0), ours, turned(10), rotary=TABLES)


def test_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    config = transformers.GptOssConfig(**SIZES, sliding_window=4)
    ours = nn.Attention(*OURS, causal=True, window=3, sinks=True, bias=True)
    compare(GptOssAttention(config, 0), ours, turned(5), rotary=TABLES)


def test_t5():
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(
        d_model=32, num_heads=4, d_kv=10, is_decoder=True, attn_implementation="eager"
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    relative = nn.RelativePositionBias(4, bidirectional=False)
    ours = nn.Attention(32, 4, None, 10, causal=True, scale=1.0, relative=relative)

    def rename(name: str) -> str:
        return f"relative.{name}" if "relative" in name else name.replace(".", "_proj.")

    compare(theirs, ours, lambda theirs, x, mask: theirs(x, mask=mask)[0], rename=rename)
