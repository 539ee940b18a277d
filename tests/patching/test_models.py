"""A patched model computes what it computed before: whole models, and models that others wrap."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.exc import RecompileError

import fastattn
from fastattn.checking import Change, compare_results, measure_reference
from fastattn.nn import norm as our_norms
from support import DEVICE, count_launches

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)


def feed_forward() -> nn.Module:
    """What stands between two attentions, from torch.nn's modules."""
    return nn.Sequential(
        nn.LayerNorm(24),
        nn.Linear(24, 40),
        nn.GELU(),
        nn.RMSNorm(40, eps=1e-6),
        nn.Dropout(0.0),
        nn.Linear(40, 24, bias=False),
        nn.Softmax(-1),
        nn.LayerNorm((5, 24), bias=False),
        nn.LogSoftmax(-1),
    )


class Loss(nn.Module):
    """A model that ends in a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 7))
        self.loss = nn.CrossEntropyLoss(torch.linspace(0.5, 2.0, 7), reduction="none")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        target = torch.arange(x.shape[0] * x.shape[1], device=x.device) % 7
        return self.loss(self.body(x).flatten(0, 1), target)


class SelfAttention(nn.Module):
    """Attention over a causal mask and padding, with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True, add_bias_kv=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1)
        padding = torch.arange(5, device=x.device) >= torch.tensor([[5], [3], [4]], device=x.device)
        o, weights = self.attention(x, x, x, attn_mask=mask, key_padding_mask=padding)
        return torch.cat([o, weights], -1)


class Translation(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.transformer = nn.Transformer(24, 2, 2, 1, 40, dropout=0.0, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(4, x.device, x.dtype)
        return self.transformer(x, x[:, :4], tgt_mask=mask, tgt_is_causal=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "feed-forward": feed_forward,
    "loss": Loss,
    "attention": SelfAttention,
    "transformer": lambda: Translation(activation="gelu"),
    "transformer, norm first": lambda: Translation(norm_first=True, activation="gelu"),
    "transformer, relu": Translation,
}
KINKED = ("transformer, relu",)
"""Of these, what is near a kink may be rounded to its other side by the layers before, and then its
gradient is another: in 16 bits at one element or another of nearly every sample."""


def results(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients "d..." of x and of every parameter."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(incoming.to(output))
    # A model may have parameters that the output does not depend on.
    leaves = {"x": leaf, **dict(model.named_parameters())}
    gradients = {"d" + name: value.grad for name, value in leaves.items() if value.grad is not None}
    return {"output": output.detach(), **gradients}


def assert_patching_changes_nothing(
    model: nn.Module, x: torch.Tensor, dtype: torch.dtype, device: Any
) -> fastattn.patching.Report:
    """Hold a patched model against the one it was made of, by the project's accuracy rule."""
    model, x = model.to(dtype), x.to(dtype)

    def run(change: Change) -> dict[str, torch.Tensor]:
        changed = copy.deepcopy(plain)
        if change.wide:
            changed.double()
        with torch.no_grad():
            for parameter, value in zip(changed.parameters(), plain.parameters(), strict=True):
                parameter.copy_(change(value))
        return results(changed.to(device), change(x).to(device))

    plain = copy.deepcopy(model)
    report = fastattn.patch(model, linear=True)
    after = results(model.to(device), x.to(device))
    measured = measure_reference(run)
    assert after.keys() == measured[0].truth.keys()
    for compared in compare_results(after, measured):
        assert compared.passed, compared
    return report


@both_backends
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in MODELS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if name not in KINKED or dtype is torch.float32
    ],
)
def test_outputs_and_gradients_are_those_of_the_unpatched_model(name, dtype, device):
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    report = assert_patching_changes_nothing(model, torch.randn(3, 5, 24), dtype, device)
    wanted = {rule.theirs for rule in fastattn.patching.RULES} | {nn.Linear}
    assert {type(module) for module in model.modules()} & wanted == set()
    assert report.replaced


@both_backends
def test_evaluation_with_padding_is_that_of_the_unpatched_model(device):
    layer = nn.TransformerEncoderLayer(24, 2, 40, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24)).to(device).eval()
    x = torch.randn(3, 5, 24, device=device)
    padding = torch.arange(5, device=device) >= torch.tensor([[5], [3], [4]], device=device)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        fastattn.patch(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
        # One that is left alone may hold others that are not, and hand them nested tensors.
        fastattn.unpatch(model)
        model.register_forward_hook(lambda module, args, output: None)
        assert len(fastattn.patch(model.layers).replaced) == 14
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)


@pytest.mark.kernels
def test_a_patched_model_launches_kernels():
    model = Translation().to(DEVICE)
    x = torch.randn(3, 5, 24, device=DEVICE)
    found = []
    for change in (lambda _: None, fastattn.patch, fastattn.unpatch):
        change(model)
        with count_launches() as launches:
            model(x)
        found.append(set(launches))
    assert {"attention_forward_kernel", "norm_forward_kernel", "matmul_kernel"} <= found[1]
    assert found[0] == found[2] == set()


def test_every_rule_is_tried():
    found = {type(module) for model in MODELS.values() for module in model().modules()}
    assert {rule.theirs for rule in fastattn.patching.RULES} <= found


@both_backends
def test_gpt2_of_transformers(device):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    model = OfEmbeddings(transformers.GPT2LMHeadModel(configuration("GPT2Config", **sizes)))
    x = torch.randn(2, 5, 24)
    report = assert_patching_changes_nothing(model, x, torch.float32, device)
    assert [entry.theirs for entry in report.replaced].count(nn.LayerNorm) == 5
    assert model.wrapped.lm_head.weight is model.wrapped.transformer.wte.weight
    left = {entry.kind.__name__: entry.reason for entry in report.left_alone}
    assert left["Conv1D"] == "no rule"


@both_backends
def test_llama_of_transformers(device):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    model = OfEmbeddings(transformers.LlamaForCausalLM(configuration("LlamaConfig", **sizes)))
    x = torch.randn(2, 5, 24)
    report = assert_patching_changes_nothing(model, x, torch.float32, device)
    replaced = {entry.theirs.__name__ for entry in report.replaced}
    parts = {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaDecoderLayer"}
    assert replaced == {"Linear", "LlamaForCausalLM", *parts}
    assert "LlamaRMSNorm" in str(report)


class OfEmbeddings(nn.Module):
    """A causal language model from its embeddings to its logits."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__()
        # Dropout would draw other numbers after patching.
        self.wrapped = wrapped.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wrapped(inputs_embeds=x, use_cache=False).logits


def configuration(name: str, **sizes: int) -> Any:
    """A configuration whose special tokens fit its few words."""
    import transformers

    return getattr(transformers, name)(
        **sizes, bos_token_id=0, eos_token_id=0, attn_implementation="eager"
    )


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is appended to whenever a LayerNorm of ours runs."""
    found: list[str] = []
    forward = our_norms.LayerNorm.forward

    def counted(self: Any, input: torch.Tensor) -> torch.Tensor:
        found.append("called")
        return forward(self, input)

    monkeypatch.setattr(our_norms.LayerNorm, "forward", counted)
    return found


def norms() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.LayerNorm(8)))


class Inside(nn.Module):
    """A model in a user's module."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_compiled_again(in_place):
    torch.compiler.reset()
    # Dynamo does not start at a forward of torch's own.
    model, x = Inside(norms()), torch.randn(3, 8)
    expected = model(x)
    if in_place:
        model.compile(fullgraph=True, backend="aot_eager")
        compiled: Any = model
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    assert len(fastattn.patch(compiled).replaced) == 2
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(RecompileError):
        compiled(x)
    torch.testing.assert_close(compiled(x), expected)
    fastattn.unpatch(compiled)
    torch.testing.assert_close(compiled(x), expected)


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(calls):
    plain = norms()
    x = torch.randn(3, 8)
    expected = results(plain, x)
    model = nn.parallel.DistributedDataParallel(norms())
    report = fastattn.patch(model)
    assert [entry.places for entry in report.replaced] == [("module.1",), ("module.2.0",)]
    for name, value in results(model, x).items():
        torch.testing.assert_close(value, expected[name.replace("dmodule.", "d")])
    assert len(calls) == 2


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fully_sharded_data_parallel(calls, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    x = torch.randn(3, 8)
    expected = results(norms(), x)
    model = FullyShardedDataParallel(
        norms(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    assert len(fastattn.patch(model).replaced) == 2
    found = results(model, x)
    for name in ("output", "dx"):
        torch.testing.assert_close(found[name], expected[name])
    assert len(calls) == 2


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("first", ["patch", "fully_shard"])
def test_fully_shard(calls, first):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, x = norms(), torch.randn(3, 8)
    expected = results(norms(), x)
    mesh = init_device_mesh("cpu", (1,))
    if first == "patch":
        fastattn.patch(model)
    for module in (model[1], model[2], model):
        fully_shard(module, mesh=mesh)
    if first == "fully_shard":
        report = fastattn.patch(model)
        assert [entry.places for entry in report.replaced] == [("2.0",)]
        assert "a subclass of LayerNorm without a rule" in str(report)
    for name, value in results(model, x).items():
        local = value.full_tensor() if isinstance(value, DTensor) else value
        torch.testing.assert_close(local, expected[name])
    assert len(calls) == (2 if first == "patch" else 1)
    if first == "patch":
        with pytest.raises(RuntimeError, match="has become a FSDPLayerNorm"):
            fastattn.unpatch(model)
