"""LoRALinear beside plain PyTorch, and what apply_lora makes of a model."""

import copy
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
    numbers,
    outcome,
    place,
)

import fastattn
import fastattn.nn as nn
from support import assert_close, same_bits

kernels = pytest.mark.kernels
IN, OUT = 12, 10


def lora(**options: Any) -> nn.LoRALinear:
    return nn.LoRALinear(IN, OUT, **{"rank": 3, "alpha": 6.0, **options})


def plain(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight + module.alpha / module.rank * module.lora_B @ module.lora_A
    return F.linear(x, weight, module.bias)


def call(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def check(backend: Any, bias: bool) -> None:
    module = place(lora(bias=bias))
    x = numbers(2, 5, IN)
    tensors = {"x": x, "lora_A": module.lora_A, "lora_B": module.lora_B}
    assert_same_outcome(lambda: module(x), lambda: plain(module, x), tensors, backend)


@kernels
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_agree_with_plain_pytorch(bias):
    check("triton", bias)


@pytest.mark.parametrize("bias", [False, True])
def test_reference_agrees_with_plain_pytorch(bias):
    check("reference", bias)


def test_it_starts_as_the_layer_it_is_around():
    torch.manual_seed(5)
    linear = torch.nn.Linear(400, 50)
    torch.manual_seed(5)
    module = nn.LoRALinear(400, 50, rank=20)
    x = torch.randn(7, 400)
    assert torch.equal(module.weight, linear.weight)
    assert torch.equal(module.bias, linear.bias)
    assert torch.equal(module(x), fastattn.linear(x, linear.weight, linear.bias))
    assert torch.equal(module.lora_B, torch.zeros(50, 20))
    # Uniform in ±1 / sqrt(400).
    assert 0.0495 < module.lora_A.abs().max() <= 0.05
    assert abs(module.lora_A.std().item() - 0.05 / 3**0.5) < 5e-4
    assert module.scaling == 1.0
    assert [name for name, p in module.named_parameters() if p.requires_grad] == [
        "lora_A",
        "lora_B",
    ]


def test_the_adaptation_may_have_another_dtype():
    module = place(lora()).to(torch.bfloat16)
    module.lora_A, module.lora_B = (
        torch.nn.Parameter(p.detach().float()) for p in (module.lora_A, module.lora_B)
    )
    x = numbers(2, 5, IN).to(torch.bfloat16)
    y = module(x)
    assert y.dtype is torch.bfloat16
    expected = plain(module.double(), x.double())
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_back(dtype):
    module = place(lora()).to(dtype).eval()
    x = numbers(4, IN).to(dtype)
    before, kept = module(x), module.weight.clone()
    state = copy.deepcopy(module.state_dict())
    module.merge()
    assert module.merged
    module.merge()
    exact = kept.double() + 2.0 * module.lora_B.double() @ module.lora_A.double()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(module.weight.double(), exact, rtol=rounding, atol=1e-7)
    assert (module(x) - before).abs().max() < 4 * rounding * before.abs().max()
    assert torch.equal(module(x), fastattn.linear(x, module.weight, module.bias))
    for name, tensor in module.state_dict().items():
        assert same_bits(tensor, state[name]), name
    module.unmerge()
    assert not module.merged
    assert same_bits(module.weight, kept)
    assert same_bits(module(x), before)
    module.unmerge()
    assert same_bits(module.weight, kept)


def test_a_state_that_is_loaded_is_not_merged():
    module, other = place(lora()), place(lora())
    module.merge()
    module.load_state_dict(other.state_dict())
    x = numbers(4, IN)
    assert not module.merged
    assert same_bits(module(x), other(x))


def test_merged_copies_can_still_be_unmerged():
    module = place(lora())
    kept = module.weight.clone()
    module.merge()
    copied = copy.deepcopy(module).double()
    copied.unmerge()
    assert torch.equal(copied.weight, kept.double())


def test_dropout_is_on_the_way_through_lora_alone():
    module = place(lora(dropout=0.5))
    x = torch.ones(2000, IN, dtype=module.weight.dtype, device=module.weight.device)
    whole = module.eval()(x)
    base = fastattn.linear(x, module.weight, module.bias)
    added = module.train()(x) - base
    assert len(added.unique(dim=0)) > 100
    assert (added.mean(0) - (whole - base)[0]).abs().max() < 0.1 * (whole - base).abs().max()
    module.merge()
    assert torch.equal(module(x), fastattn.linear(x, module.weight, module.bias))


def test_copies_and_round_trips():
    assert_survives_copies(lora, call, numbers(4, IN))


@kernels
@pytest.mark.slow
def test_compiles_without_graph_breaks():
    assert_compiles(place(lora()), call, numbers(4, IN))


def test_compiles_without_graph_breaks_on_the_reference():
    with fastattn.backend("reference"):
        assert_compiles(place(lora()), call, numbers(4, IN))


def test_checkpointing():
    assert_checkpoints(place(lora(dropout=0.5)), call, numbers(4, IN))


def test_16_bits():
    assert_works_in_16_bits(place(lora()), call, numbers(4, IN))


def test_autocast():
    assert_autocasts(place(lora()), call, numbers(4, IN))


def model() -> torch.nn.Module:
    def block() -> nn.TransformerBlock:
        attention = nn.Attention(IN, 2, bias=True)
        return nn.TransformerBlock(attention, nn.GatedMLP(IN, 16), partial(nn.RMSNorm, IN))

    return nn.TransformerStack([block(), block()], nn.RMSNorm(IN))


def adapted(module: torch.nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, nn.LoRALinear)]


Q = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
UP = ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]
TARGETS: dict[str, tuple[Any, list[str]]] = {
    "a name": ("q_proj", Q),
    "names": (["q_proj", "up_proj"], Q + UP),
    "a whole name": ("layers.1.self_attn.q_proj", Q[1:]),
    "a pattern": ("layers.*.mlp.u*", UP),
    "a pattern and a name": (["layers.0.*.q_proj", "up_proj"], Q[:1] + UP),
}


@pytest.mark.parametrize(("targets", "expected"), TARGETS.values(), ids=TARGETS)
def test_what_targets_name(targets, expected):
    made = model()
    x = torch.randn(2, 5, IN)
    y, state = made(x), {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert sorted(nn.apply_lora(made, targets, rank=2)) == sorted(expected)
    assert sorted(adapted(made)) == sorted(expected)
    torch.testing.assert_close(made(x), y)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    names = {f"{name}.lora_{letter}" for name in expected for letter in "AB"}
    assert trained == names
    assert set(nn.lora_state_dict(made)) == names
    # The names of all else are as they were, so its checkpoints load.
    found = made.load_state_dict(state, strict=False)
    assert set(found.missing_keys) == names
    assert not found.unexpected_keys


def test_training_changes_lora_alone_and_its_state_is_enough():
    made = model()
    other = copy.deepcopy(made)
    nn.apply_lora(made, ["*_proj"], rank=2, alpha=4.0)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(2, 2, 5, IN)
    losses = []
    for _ in range(5):
        loss = (made(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, p in made.named_parameters():
        assert torch.equal(p, before[name]) is ("lora" not in name), name
    nn.apply_lora(other, "*_proj", rank=2, alpha=4.0)
    found = other.load_state_dict(nn.lora_state_dict(made), strict=False)
    assert not found.unexpected_keys
    assert torch.equal(other(x), made(x))
    nn.merge_lora(other)
    assert not adapted(other)
    torch.testing.assert_close(other(x), made(x))
    assert other.state_dict().keys() == model().state_dict().keys()


def test_a_second_call_keeps_what_the_first_one_trains():
    made = model()
    nn.apply_lora(made, "q_proj")
    nn.apply_lora(made, "v_proj")
    trained = {name.split(".")[-2] for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}


def test_shared_layers_and_tied_weights_stay_so():
    shared = nn.Linear(IN, IN, bias=False)
    made = torch.nn.ModuleDict({"a": shared, "b": shared, "head": nn.Linear(IN, 30, bias=False)})
    made["embedding"] = torch.nn.Embedding(30, IN)
    made["head"].weight = made["embedding"].weight
    assert nn.apply_lora(made, ["a", "b", "head"]) == ["a", "b", "head"]
    assert made["a"] is made["b"]
    assert made["head"].weight is made["embedding"].weight
    nn.merge_lora(made)
    assert made["a"] is made["b"]


def test_gradients_through_a_gated_mlp_are_those_of_merged_weights():
    """The fused kernel of gate and up would pass adapted layers by."""
    mlp = place(nn.GatedMLP(IN, 16))
    nn.apply_lora(mlp, ["gate_proj", "up_proj"], rank=2)
    mlp = place(mlp)
    x = numbers(3, IN)
    merged = copy.deepcopy(mlp)
    nn.merge_lora(merged)
    for name, found in outcome(lambda: mlp(x), {"x": x}).items():
        assert_close(found, outcome(lambda: merged(x), {"x": x})[name], name)


def test_what_cannot_be_adapted_is_named_and_nothing_is_changed():
    made = torch.nn.ModuleDict(
        {
            "good": nn.Linear(4, 4),
            "active": nn.Linear(4, 4, activation="relu"),
            "hooked": nn.Linear(4, 4),
            "attention": torch.nn.MultiheadAttention(4, 2),
        }
    )
    made["hooked"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"no linear layer is named 'query'; there are active"):
        nn.apply_lora(made, ["good", "query"])
    for target, kind in (
        ("active", "Linear"),
        ("hooked", "Linear"),
        ("out_proj", "NonDynamicallyQuantizableLinear"),
    ):
        with pytest.raises(ValueError, match=rf"{target} is a {kind} that cannot be replaced"):
            nn.apply_lora(made, ["good", target])
    assert not adapted(made)
    assert all(p.requires_grad for p in made.parameters())
    with pytest.raises(ValueError, match="the model itself is a Linear"):
        nn.apply_lora(nn.Linear(4, 4), "*")
    with pytest.raises(ValueError, match="there are none"):
        nn.apply_lora(torch.nn.ReLU(), "q_proj")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        lora(rank=0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 2"):
        lora(dropout=2)
