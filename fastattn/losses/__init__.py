"""Losses of alignment and reinforcement learning, in plain PyTorch on numbers of tokens.

They take what `fastattn.linear_log_prob` gives, log-probabilities (B, T) of tokens of sequences,
and a mask (B, T) of those that count: the numbers of others reach no result. None reduces over a
batch but `aggregate`, which is told what to divide by, and none communicates but `info_nce` where
it is given a group. All have gradients of any order and compile in one graph.

    log_prob = fastattn.linear_log_prob(hidden, head.weight, tokens)
    loss = losses.dpo(log_prob, reference, mask, beta=0.1).mean()
"""

from .contrastive import gather_rows as gather_rows
from .contrastive import info_nce as info_nce
from .numbers import masked_mean as masked_mean
from .numbers import masked_sum as masked_sum
from .numbers import pack_rows as pack_rows
from .numbers import unpack_rows as unpack_rows
from .numbers import whiten as whiten
from .policy import aggregate as aggregate
from .policy import cispo as cispo
from .policy import gae as gae
from .policy import group_advantages as group_advantages
from .policy import importance_ratio as importance_ratio
from .policy import kl_estimate as kl_estimate
from .policy import ppo as ppo
from .policy import value_loss as value_loss
from .preference import PREFERENCES as PREFERENCES
from .preference import bradley_terry as bradley_terry
from .preference import dpo as dpo
from .preference import kto as kto
from .preference import kto_baseline as kto_baseline
from .preference import orpo as orpo
from .preference import simpo as simpo
