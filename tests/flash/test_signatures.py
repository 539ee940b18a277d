"""Names, order and defaults of parameters are those of flash-attn 2.8, as libraries read them."""

import inspect
import pkgutil

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

flash_attn_kvpacked_func
(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
 alibi_slopes=None, deterministic=False, return_attn_probs=False)

flash_attn_qkvpacked_func
(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
 alibi_slopes=None, deterministic=False, return_attn_probs=False)

flash_attn_varlen_kvpacked_func
(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
 softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
 deterministic=False, return_attn_probs=False)

flash_attn_varlen_qkvpacked_func
(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
 window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
 return_attn_probs=False)

flash_attn_with_kvcache
(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
 cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
 window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
 return_softmax_lse=False)

flash_attn_interface._flash_attn_forward
(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
 alibi_slopes, return_softmax)

flash_attn_interface._flash_attn_varlen_forward
(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
 causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
 return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False)

flash_attn_interface._flash_attn_backward
(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
 window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None)

flash_attn_interface._flash_attn_varlen_backward
(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
 max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
 alibi_slopes, deterministic, rng_state=None, zero_tensors=False)

losses.cross_entropy.CrossEntropyLoss
(ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0,
 lse_square_scale=0.0, inplace_backward=False, process_group=None, return_z_loss=False)

losses.cross_entropy.CrossEntropyLoss.forward
(self, input, target, precomputed_lse=None)

ops.triton.cross_entropy.cross_entropy_loss
(logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0,
 lse_square_scale=0.0, ignore_index=-100, inplace_backward=False, process_group=None)

ops.triton.layer_norm.layer_norm_fn
(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0,
 rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False,
 is_rms_norm=False, return_dropout_mask=False, out_dtype=None, out=None, residual_out=None)

ops.triton.layer_norm.rms_norm_fn
(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0,
 rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False,
 return_dropout_mask=False, out_dtype=None, out=None, residual_out=None)

ops.triton.layer_norm.RMSNorm
(hidden_size, eps=1e-05, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None)

ops.triton.layer_norm.RMSNorm.forward
(self, x, residual=None, prenorm=False, residual_in_fp32=False)

layers.rotary.apply_rotary_emb
(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
 max_seqlen=None)

layers.rotary.apply_rotary_emb_func
(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
 max_seqlen=None)

layers.rotary.apply_rotary_emb_qkv_
(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None)

layers.rotary.apply_rotary_emb_kv_
(kv, cos, sin, interleaved=False, seqlen_offsets=0)

layers.rotary.RotaryEmbedding
(dim, base=10000.0, interleaved=False, scale_base=None, device=None)

layers.rotary.RotaryEmbedding.forward
(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None)

ops.activations.swiglu
(x, y)

ops.fused_dense.fused_dense_func
(x, weight, bias=None, return_residual=False, process_group=None, sequence_parallel=True)

ops.fused_dense.FusedDense
(in_features, out_features, bias=True, return_residual=False, device=None, dtype=None)

ops.fused_dense.FusedDense.forward
(self, x, process_group=None)

modules.mha.MHA
(embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True,
 out_proj_bias=True, dropout=0.0, softmax_scale=None, causal=False, layer_idx=None,
 dwconv=False, rotary_emb_dim=0, rotary_emb_base=10000.0, rotary_emb_scale_base=None,
 rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1), fused_bias_fc=False,
 use_flash_attn=False, return_residual=False, checkpointing=False, device=None, dtype=None)

modules.mha.MHA.forward
(self, x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None,
 mixer_subset=None, inference_params=None, **kwargs)

modules.mha.FlashSelfAttention
(causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1),
 alibi_slopes=None, deterministic=False)

modules.mha.FlashSelfAttention.forward
(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None)

modules.mha.FlashCrossAttention
(causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None,
 window_size=(-1, -1), deterministic=False)

modules.mha.FlashCrossAttention.forward
(self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None,
 max_seqlen_k=None)
"""

CASES = [case.split("\n", 1) for case in SIGNATURES.strip().split("\n\n")]


@pytest.mark.parametrize(("name", "expected"), CASES, ids=[name for name, _ in CASES])
def test_signature(name: str, expected: str):
    signature = inspect.signature(pkgutil.resolve_name(f"fastattn.integrations.flash_attn.{name}"))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == " ".join(expected.split())
