"""What pip installs, what is importable under which name, and what happens without triton."""

import email.parser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

USE_RMS_NORM = """
import torch, fastattn
x, weight = torch.randn(3, 40), torch.randn(40)
expected = torch.nn.functional.rms_norm(x, (40,), weight, eps=1e-6)
torch.testing.assert_close(fastattn.rms_norm(x, weight, eps=1e-6), expected)
"""


def run_python(code: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that starts in cwd, with one more folder to import from."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def output_of(code: str, cwd: Path, path: Path | None = None) -> str:
    """What the code prints; it must succeed."""
    result = run_python(code, cwd, path)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# The name `kernels` belongs to Hugging Face's package, which transformers looks for.

PRINT_ORIGIN = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec and spec.origin)
"""


def test_kernels_is_a_linked_folder_and_no_package():
    assert os.readlink(ROOT / "fastattn" / "kernels") == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("folder", [".", "tests", "fastattn"])
def test_nothing_is_importable_as_kernels(folder: str):
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        assert not Path(spec.origin).is_relative_to(ROOT)
        pytest.skip("another project's kernels package is installed here")
    assert output_of(PRINT_ORIGIN, cwd=ROOT / folder) == "None"


@pytest.mark.parametrize("folder", [".", "tests", "fastattn"])
def test_a_real_kernels_package_wins(folder: str, tmp_path: Path):
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    assert output_of(PRINT_ORIGIN, cwd=ROOT / folder, path=tmp_path) == str(package)


@pytest.mark.slow
def test_transformers_works_from_the_repository_root():
    pytest.importorskip("transformers")
    code = """
import torch, transformers
config = transformers.LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
print(transformers.LlamaForCausalLM(config)(torch.arange(4)[None]).logits.shape)
"""
    assert output_of(code, cwd=ROOT) == "torch.Size([1, 4, 16])"


# A download without symbolic links, and a machine without triton.


def test_a_link_that_became_a_text_file_gives_one_clear_line(tmp_path: Path):
    shutil.copytree(
        ROOT / "fastattn",
        tmp_path / "fastattn",
        symlinks=True,
        ignore=shutil.ignore_patterns("kernels", "__pycache__"),
    )
    (tmp_path / "fastattn" / "kernels").write_text("../kernels")
    result = run_python("import fastattn", cwd=tmp_path)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ")
    assert "symbolic link" in last_line
    assert result.stderr.count("Traceback") == 1, "the message hides behind another exception"


WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def test_reference_backend_works_without_triton(tmp_path: Path):
    output_of(WITHOUT_TRITON + USE_RMS_NORM, cwd=ROOT)


def test_asking_for_triton_where_there_is_none_says_so():
    code = WITHOUT_TRITON + (
        "import torch, fastattn\n"
        "with fastattn.backend('triton'):\n"
        "    fastattn.rms_norm(torch.ones(2, 4))\n"
    )
    result = run_python(code, cwd=ROOT)
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("RuntimeError: "), result.stderr
    assert "triton" in last_line.lower()


# What is built and installed.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist of a copy of the sources, as a release would be."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastattn", "kernels"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    command = [sys.executable, "-m", "build", "--no-isolation", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--target", str(target), str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path):
    kernels = ROOT / "kernels"
    files = [*(ROOT / "fastattn").rglob("*.py"), ROOT / "fastattn" / "py.typed"]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {
        f"fastattn/kernels/{path.relative_to(kernels).as_posix()}"
        for path in (*kernels.rglob("*.py"), *kernels.glob("tuned/*.json"))
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.startswith("fastattn/kernels/") for name in names)


@pytest.mark.slow
def test_wheel_says_what_it_is_and_what_it_needs(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == fastattn.__version__
    core = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert core == ["torch>=2.10", 'triton>=3.6; sys_platform == "linux"']

    versions = [name for name in metadata.get_all("Classifier", []) if ":: 3." in name]
    oldest, newest = versions[0].rpartition(".")[2], versions[-1].rpartition(".")[2]
    assert metadata["Requires-Python"] == f">=3.{oldest}"
    assert len(versions) == int(newest) - int(oldest) + 1


@pytest.mark.slow
def test_twine_takes_wheel_and_sdist(wheel: Path):
    pytest.importorskip("twine")
    command = [
        sys.executable,
        "-m",
        "twine",
        "check",
        "--strict",
        *map(str, wheel.parent.iterdir()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("PASSED") == 2


def test_version_is_the_changelogs_and_the_citations():
    newest = re.search(r"^## ([\d.]+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest
    assert newest[1] == fastattn.__version__
    assert f"version: {newest[1]}\n" in (ROOT / "CITATION.cff").read_text()


def test_badges_say_what_the_package_does():
    project = (ROOT / "pyproject.toml").read_text()
    badges = re.findall(
        r"!\[([^\]]*)\]\(https://img\.shields\.io/badge/([^)]*)\)", README.read_text()
    )
    said = {label: what for label, _, what in (text.partition(" ") for text, _ in badges)}
    oldest = {"Python": r'^requires-python = ">= ([\d.]+)"'}
    oldest |= {name: rf'^ +"{name} >= ([\d.]+)' for name in ("torch", "triton")}
    for name, pattern in oldest.items():
        found = re.search(pattern, project, flags=re.MULTILINE)
        assert found
        assert said.pop(name) == f"{found[1]} or newer"
    assert said == {"version": fastattn.__version__, "license": "BSD-3-Clause"}
    assert 'license = "BSD-3-Clause"' in project
    for text, picture in badges:
        label, _, what = text.partition(" ")
        escaped = what.replace("-", "--").replace(" ", "_")
        assert picture == f"{label.lower()}-{escaped}-blue"


@pytest.mark.slow
def test_wheel_works_from_another_folder(installed: Path, tmp_path: Path):
    code = USE_RMS_NORM + "print(fastattn.__file__)"
    output = output_of(code, cwd=tmp_path, path=installed)
    assert output == str(installed / "fastattn" / "__init__.py")


@pytest.mark.slow
def test_kernels_of_the_wheel_can_be_imported(installed: Path, tmp_path: Path):
    pytest.importorskip("triton")
    paths = sorted((installed / "fastattn" / "kernels").rglob("*.py"))
    names = [".".join(path.relative_to(installed).with_suffix("").parts) for path in paths]
    code = "from importlib import import_module\n"
    code += "".join(f"print(import_module('{name}').__file__)\n" for name in names)
    files = output_of(code, cwd=tmp_path, path=installed).splitlines()
    assert files == [str(path) for path in paths]
    assert files
