"""The names that `fastattn.ops` offers, and `fastattn` beside others: one line each, and no more.

Both take all of it. `import name as name` tells type checkers that a name is meant for others.
"""

from .append_kv import append_kv as append_kv
from .attention import BlockMask as BlockMask
from .attention import MaskTerm as MaskTerm
from .attention import RelativeBias as RelativeBias
from .attention import RelativeShift as RelativeShift
from .attention import ScoreTerm as ScoreTerm
from .attention import alibi_slopes as alibi_slopes
from .attention import and_masks as and_masks
from .attention import attention as attention
from .attention import attention_varlen as attention_varlen
from .attention import attention_weights as attention_weights
from .attention import create_block_mask as create_block_mask
from .attention import mask_mod as mask_mod
from .attention import or_masks as or_masks
from .attention import save_attention as save_attention
from .attention import score_mod as score_mod
from .attention import triangle_attention as triangle_attention
from .core.backends import backend as backend
from .core.batch_invariance import batch_invariant as batch_invariant
from .cross_entropy import cross_entropy as cross_entropy
from .decode_attention import decode_attention as decode_attention
from .dropout import dropout as dropout
from .dropout import dropout_mask as dropout_mask
from .gated_activation import geglu as geglu
from .gated_activation import glu as glu
from .gated_activation import reglu as reglu
from .gated_activation import swiglu as swiglu
from .gated_linear import gated_linear as gated_linear
from .gated_rms_norm import gated_rms_norm as gated_rms_norm
from .grouped_linear import grouped_linear as grouped_linear
from .layer_norm import add_layer_norm as add_layer_norm
from .layer_norm import layer_norm as layer_norm
from .linear import linear as linear
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .linear_jsd import linear_jsd as linear_jsd
from .linear_log_prob import linear_log_prob as linear_log_prob
from .linear_top_k_kl import linear_top_k_kl as linear_top_k_kl
from .log_prob import log_prob as log_prob
from .matmul import matmul as matmul
from .merge_attention import merge_attention as merge_attention
from .mixture import mixture as mixture
from .modulated_norm import modulated_layer_norm as modulated_layer_norm
from .modulated_norm import modulated_rms_norm as modulated_rms_norm
from .rms_norm import add_rms_norm as add_rms_norm
from .rms_norm import rms_norm as rms_norm
from .rotary import apply_rotary as apply_rotary
from .rotary import apply_rotary_qk as apply_rotary_qk
from .routing import load_balancing_loss as load_balancing_loss
from .routing import route_top_k as route_top_k
from .routing import router_z_loss as router_z_loss
from .softmax import log_softmax as log_softmax
from .softmax import softmax as softmax
