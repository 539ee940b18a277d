"""python -m fastattn hub: a kernel of Hugging Face's Hub, loaded by `kernels` and as it does."""

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import fastattn
from fastattn.__main__ import main
from fastattn.integrations import hub
from support import DEVICE

LOAD = """
import importlib.util, json, sys
from pathlib import Path

import torch

variant = Path(sys.argv[1], "build", "torch-universal")
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
"""

USE = """
torch.manual_seed(0)
device = sys.argv[2]
q, k, v = (torch.randn(1, 5, 2, 16, device=device, requires_grad=True) for _ in range(3))
o = module.flash_attn_func(q, k, v, causal=True)
o = module.attention(
    *(x.transpose(1, 2) for x in (o, k, v)),
    score_mods=[module.score_mod(lambda score, b, h, i, j: score + (i - j) * 0.1)],
)
gradients = torch.autograd.grad(o.sum(), (q, k, v))
normed = torch.compile(module.rms_norm, backend="eager", fullgraph=True)(o)
copied = [name for name in sys.modules if name.partition(".")[0] == "fastattn"]
assert not copied, copied
torch.save([*gradients, o.detach(), normed.detach()], sys.argv[3])
"""
"""What is there under a changed name, a term of a plain function included, and nothing else."""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    """A folder that the command has written."""
    out = tmp_path_factory.mktemp("hub") / "fastattn"
    assert main(["hub", str(out)]) == 0
    return out


def test_every_file_has_its_digest(kernel):
    variant = kernel / "build" / "torch-universal"
    metadata = json.loads((variant / "metadata.json").read_text())
    files = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
    assert metadata["digest"]["files"].keys() == files - {"metadata.json"}
    for name, digest in metadata["digest"]["files"].items():
        found = hashlib.sha256((variant / name).read_bytes()).digest()
        assert base64.b64encode(found).decode() == digest
    assert {"__init__.py", "kernels/dropout.py", "py.typed"} <= files
    assert not {name for name in files if name.startswith(("commands/", "demo/", "machine/"))}
    assert metadata["id"].isidentifier()


def test_the_id_is_that_of_the_contents(kernel, tmp_path):
    read = [(kernel / "build" / "torch-universal" / "metadata.json").read_text()]
    assert main(["hub", str(tmp_path / "again")]) == 0
    read.append((tmp_path / "again" / "build" / "torch-universal" / "metadata.json").read_text())
    assert read[0] == read[1]


def test_a_folder_that_has_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "here").touch()
    assert main(["hub", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def use(kernel: Path, load: str, device: str, out: Path) -> list[torch.Tensor]:
    """What the copy computes in a process of its own, which has no other fastattn."""
    command = [sys.executable, "-c", load + USE, str(kernel), device, str(out)]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def expected(device: str) -> list[torch.Tensor]:
    """The same by the package that is tested."""
    module = fastattn
    from fastattn.integrations.flash_attn import flash_attn_func

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 16, device=device, requires_grad=True) for _ in range(3))
    o = flash_attn_func(q, k, v, causal=True)
    term = module.score_mod(lambda score, b, h, i, j: score + (i - j) * 0.1)
    o = module.attention(*(x.transpose(1, 2) for x in (o, k, v)), score_mods=[term])
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    return [*gradients, o.detach(), module.rms_norm(o).detach()]


@pytest.mark.slow
def test_a_copy_under_another_name_computes_the_same_on_the_reference(kernel, tmp_path):
    with fastattn.backend("reference"):
        ours = expected("cpu")
    load = LOAD + "module.backend('reference').__enter__()\n"
    found = use(kernel, load, "cpu", tmp_path / "found.pt")
    assert all(map(torch.equal, found, ours))


@pytest.mark.slow
@pytest.mark.kernels
def test_a_copy_under_another_name_launches_the_same_kernels(kernel, tmp_path):
    found = use(kernel, LOAD, str(DEVICE), tmp_path / "found.pt")
    assert all(map(torch.equal, found, expected(str(DEVICE))))


class Llama(nn.Module):
    """transformers' LlamaRMSNorm, as it is written there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Round, then multiply."""
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class GptOss(Llama):
    """That of gpt-oss."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Multiply, then round."""
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * x).to(hidden_states.dtype)


class Gemma(nn.Module):
    """That of Gemma."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the weight and one, then round."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


NORMS = {"LlamaRMSNorm": Llama, "GptOssRMSNorm": GptOss, "GemmaRMSNorm": Gemma}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_layers_have_the_bits_of_the_norms_that_they_replace(name, dtype, weight_dtype):
    norm = NORMS[name]().to(weight_dtype)
    x = torch.randn(64, 16).to(dtype)
    with fastattn.backend("reference"):
        y = getattr(hub, name).forward(norm, x)
    assert y.dtype is norm(x).dtype
    assert torch.equal(y, norm(x))


def test_kernels_loads_it_and_exchanges_a_norm(kernel):
    # A folder here has the name too, but not its modules.
    pytest.importorskip("kernels.layer", reason="Hugging Face's kernels is not installed")
    kernels = importlib.import_module("kernels")
    name = next(filter(importlib.util.find_spec, ("kernels._data", "kernels._rust")))
    data = importlib.import_module(name)
    variant = kernel / "build" / "torch-universal"
    found = data.Digest.hash_variant(data.DigestAlgorithm.SHA256, variant)
    data.Metadata.read_from_file(variant / "metadata.json").digest.validate(found)
    module = kernels.get_local_kernel(kernel)
    assert module.__name__.startswith("_fastattn_")
    assert module.__version__ == fastattn.__version__
    q = torch.randn(1, 5, 2, 16)
    assert module.flash_attn_func(q, q, q, causal=True).shape == q.shape

    kernels.replace_kernel_forward_from_hub(Llama, "RMSNorm")
    repository = kernels.LocalLayerRepository(repo_path=kernel, layer_name="LlamaRMSNorm")
    norm, x = Llama(), torch.randn(3, 16)
    theirs = norm(x)
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": repository}}, inherit_mapping=False):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(norm, mode=mode, device="cpu", use_fallback=False)
    assert norm.forward.__module__ == f"{module.__name__}.integrations.hub"
    assert torch.equal(norm(x), theirs)
