"""A program written for flash-attn, unchanged: `install_as_flash_attn` lets it find ours.

The program packs sequences of different lengths, trains a layer of attention on them, and runs
where flash-attn cannot be installed, as on a CPU. Run it with
`python docs/examples/flash_attn_caller.py`.
"""

import torch

from fastattn.integrations.flash_attn import install_as_flash_attn, uninstall_as_flash_attn

PROGRAM = '''
from flash_attn import flash_attn_varlen_func
from flash_attn.bert_padding import pad_input, unpad_input


def attend(qkv, mask):
    """Causal attention of padded rows (B, S, 3, H, D), without computing their padding."""
    batch, length = mask.shape
    packed, indices, cu_seqlens, longest, _ = unpad_input(qkv, mask)
    q, k, v = packed.unbind(1)
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    return pad_input(out, indices, batch, length)
'''


def plain(qkv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The formula, with all scores in memory."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() & mask[:, None, None].bool()
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def main() -> float:
    """The largest difference from the formula in float64, of outputs and gradients."""
    torch.manual_seed(0)
    mask = (torch.arange(20) < torch.tensor([[20], [13], [4]])).int()
    qkv = torch.randn(3, 20, 3, 4, 16)
    install_as_flash_attn()
    try:
        exec(PROGRAM, names := {})
    finally:
        uninstall_as_flash_attn()
    results = []
    for attend, dtype in ((names["attend"], torch.float32), (plain, torch.float64)):
        x = qkv.detach().to(dtype).requires_grad_()
        real = attend(x, mask) * mask[..., None, None]
        real.square().sum().backward()
        results.append((real, x.grad))
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(*results))


if __name__ == "__main__":
    print(f"outputs and gradients differ from the formula by {main():.0e} at most")
