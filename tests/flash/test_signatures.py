"""Names, order and defaults of parameters are those of flash-attn 2.8, as libraries read them."""

import importlib
import inspect

import pytest

# As `inspect.signature` prints them of flash-attn 2.8.3, without the annotations.
SIGNATURES = """
flash_attn_func
(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
 alibi_slopes=None, deterministic=False, return_attn_probs=False)

flash_attn_varlen_func
(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
 softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
 deterministic=False, return_attn_probs=False, block_table=None)

bert_padding.index_first_axis
(input, indices)

bert_padding.index_put_first_axis
(values, indices, first_axis_dim)

bert_padding.unpad_input
(hidden_states, attention_mask, unused_mask=None)

bert_padding.pad_input
(hidden_states, indices, batch, seqlen)
"""

CASES = [case.split("\n", 1) for case in SIGNATURES.strip().split("\n\n")]


@pytest.mark.parametrize(("name", "expected"), CASES, ids=[name for name, _ in CASES])
def test_signature(name: str, expected: str):
    module, _, function = name.rpartition(".")
    path = ".".join(filter(None, ("fastattn.integrations.flash_attn", module)))
    signature = inspect.signature(getattr(importlib.import_module(path), function))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == " ".join(expected.split())
