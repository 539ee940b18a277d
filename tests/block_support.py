"""What tests of transformer modules share: the same in plain PyTorch, and what every module can."""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn
from support import DEVICE, WIDEST, assert_close, same_bits


def place(module: nn.Module) -> Any:
    """A module where the tests' numbers are, with values of parameters that hide nothing."""
    module = module.to(DEVICE or "cpu", WIDEST)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
            elif name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    return module


def numbers(*shape: int) -> torch.Tensor:
    """A leaf of random numbers."""
    return torch.randn(shape, dtype=WIDEST, device=DEVICE or "cpu", requires_grad=True)


def weighted(y: torch.Tensor) -> torch.Tensor:
    """A scalar that no symmetry hides."""
    weight = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype, device=y.device)
    return (y * weight.reshape(y.shape)).sum()


def outcome(
    call: Callable[[], torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a call gives, and the gradients of tensors that it depends on."""
    y = call()
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad(weighted(y), list(wanted.values()))
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def assert_same_outcome(
    call: Callable[[], torch.Tensor],
    plain: Callable[[], torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    backend: Any = "auto",
) -> None:
    """A call on a backend gives what a plain one does, with the same gradients."""
    with fastattn.backend(backend):
        found = outcome(call, tensors)
    for name, expected in outcome(plain, tensors).items():
        assert_close(found[name], expected, name)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Halves of (..., S, D) turned by tables (S, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of (B, H, M, D) in as many lines as it takes; `keep` is all that masks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    score = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if bias is not None:
        score = score + bias
    if keep is not None:
        score = score.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].expand(*score.shape[:-1], 1)
        return torch.cat((score, column), dim=-1).softmax(-1)[..., :-1] @ v
    return score.softmax(-1) @ v


def causal(queries: int, keys: int, before: int | None = None) -> torch.Tensor:
    """Which keys a query sees that sees none behind itself, and not more than `before` before."""
    place = torch.arange(keys - queries, keys, device=DEVICE or "cpu")[:, None]
    key = torch.arange(keys, device=DEVICE or "cpu")
    seen = key <= place
    return seen if before is None else seen & (key >= place - before)


def plain_module(module: Any, x: torch.Tensor, context: torch.Tensor | None = None, **given: Any):
    """`fastattn.nn.Attention` by its parameters alone; given: tables, bias, keep."""
    source = x if context is None else context

    def heads(projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, projection.weight, projection.bias)
        return y.view(*x.shape[:2], -1, module.head_dim)

    q, k, v = heads(module.q_proj, x), heads(module.k_proj, source), heads(module.v_proj, source)
    if module.q_norm is not None:
        q, k = rms_norm(q, module.q_norm.weight), rms_norm(k, module.k_norm.weight)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tables = given.pop("tables", None)
    if tables is not None:
        q, k = rotated(q, *tables), rotated(k, *tables)
    o = plain_attention(
        q, k, v, scale=module.scale, softcap=module.softcap, sinks=module.sinks, **given
    )
    o = o.transpose(1, 2).reshape(*x.shape[:2], -1)
    return F.linear(o, module.o_proj.weight, module.o_proj.bias)


Call = Callable[[Any, torch.Tensor], torch.Tensor]


def assert_survives_copies(make: Callable[[], nn.Module], call: Call, x: torch.Tensor) -> None:
    """state_dict, deepcopy and pickle keep everything; what is made on "meta" can be filled."""
    module = place(make()).eval()
    y = call(module, x)
    loaded = place(make()).eval()
    assert loaded.load_state_dict(module.state_dict()) == ([], [])
    for copied in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same_bits(call(copied, x), y)
        assert repr(copied) == repr(module)


def assert_compiles(module: Any, call: Call, x: torch.Tensor, backend: str = "aot_eager") -> None:
    """Without graph breaks, to the same bits, forward and backward."""
    torch.compiler.reset()
    tensors = {"x": x, **dict(module.named_parameters())}
    expected = outcome(lambda: call(module, x), tensors)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    found = outcome(lambda: compiled(module, x), tensors)
    for name, one in expected.items():
        assert same_bits(found[name], one), name


def assert_checkpoints(module: Any, call: Call, x: torch.Tensor) -> None:
    """Computed again in the backward, to the same bits; with dropout the same elements drop."""
    tensors = {"x": x, **dict(module.named_parameters())}
    torch.manual_seed(1)
    expected = outcome(lambda: call(module, x), tensors)
    torch.manual_seed(1)
    found = outcome(lambda: checkpoint(call, module, x, use_reentrant=False), tensors)
    for name, one in expected.items():
        assert same_bits(found[name], one), name


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast(DEVICE or "cpu", dtype=torch.bfloat16):
        yield


def assert_works_in_16_bits(module: Any, call: Call, x: torch.Tensor) -> None:
    """As near to float64 as its dtypes allow, with gradients in the dtypes of what they are of."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(module).to(dtype)
        wide = copy.deepcopy(narrow).to(WIDEST)
        own = x.detach().to(dtype).requires_grad_()
        y = call(narrow, own)
        assert y.dtype is dtype
        expected = call(wide, own.detach().to(WIDEST))
        error = (y - expected).abs().max() / expected.abs().max()
        assert error < 20 * torch.finfo(dtype).eps, f"{dtype}: {error:.1e}"
        weighted(y).backward()
        assert own.grad is not None
        assert own.grad.dtype is dtype
        for name, parameter in narrow.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype is parameter.dtype, name
                assert parameter.grad.isfinite().all(), name


def assert_autocasts(module: Any, call: Call, x: torch.Tensor) -> None:
    """Near the result in float32, computed in bfloat16; parameters' gradients are in float32."""
    module, x = module.float(), x.detach().float().requires_grad_()
    expected = call(module, x)
    with autocast():
        y = call(module, x)
    error = (y.float() - expected).abs().max() / expected.abs().max()
    assert 0.0 < error < 0.03
    weighted(y).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype is torch.float32, name
            assert parameter.grad.isfinite().all(), name
