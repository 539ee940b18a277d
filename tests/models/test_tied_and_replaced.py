"""Which weights are one is seen from the tensors, and what takes a layer's place is called."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CLASSES, LANGUAGE_MODELS, batch_of, gradients_of, small, unlabelled
from torch import nn
from torch.nn.utils import parametrizations

import fastattn
from fastattn import models
from fastattn.models import CheckpointError
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
pytest.importorskip("safetensors")
language_models = pytest.mark.parametrize("name", LANGUAGE_MODELS)


def head_of(model: Any) -> Any:
    return model.get_submodule(model.head_layer)


def replace_head(model: Any, layer: nn.Module) -> None:
    owner, _, attribute = model.head_layer.rpartition(".")
    setattr(model.get_submodule(owner), attribute, layer)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**unlabelled(model, batch_of(model))).logits


def embedding_of(model: Any) -> nn.Parameter:
    return model.get_parameter(model.tied[f"{model.head_layer}.weight"])


def read_again(model: Any, folder: Path, *, as_transformers: bool = True) -> Any:
    """The model from what it writes, after transformers has read the same from there."""
    model.save_pretrained(folder)
    again = models.from_pretrained(folder)
    assert type(again) is type(model)
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # The last bits of a product depend on where in memory its operands are.
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-5)
    # Of a Switch Transformer it scales the output where it is tied, whatever else is said.
    if as_transformers and not type(model).__name__.startswith("Switch"):
        transformers = pytest.importorskip("transformers")
        kind = getattr(transformers, type(model).__name__)
        theirs, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        wanted = theirs.eval()(**unlabelled(model, batch_of(model))).logits.detach()
        torch.testing.assert_close(wanted, logits_of(model), rtol=1e-5, atol=1e-5)
    return again


@language_models
def test_a_head_untied_by_hand(name: str, tmp_path: Path) -> None:
    model = small(name, torch.float32, tie_word_embeddings=True)
    head_of(model).weight = nn.Parameter(embedding_of(model).detach() + 0.1)
    again = read_again(model, tmp_path)
    assert head_of(again).weight is not embedding_of(again)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


@language_models
def test_a_head_untied_by_hand_with_the_same_numbers(name: str, tmp_path: Path) -> None:
    model = small(name, torch.float32, tie_word_embeddings=True)
    head_of(model).weight = nn.Parameter(embedding_of(model).detach().clone())
    again = read_again(model, tmp_path)
    assert head_of(again).weight is not embedding_of(again)


@language_models
@pytest.mark.parametrize("by", ["parameter", "memory"])
def test_a_head_tied_by_hand(name: str, by: str, tmp_path: Path) -> None:
    model: Any = small(name, torch.float32, tie_word_embeddings=False)
    if by == "parameter":
        for tied, source in model.tied.items():
            owner, _, attribute = tied.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(source))
    else:
        for tied, source in model.tied.items():
            model.get_parameter(tied).data = model.get_parameter(source).data
    again = read_again(model, tmp_path)
    assert head_of(again).weight is embedding_of(again)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True


def test_other_layers_tied_by_hand(tmp_path: Path) -> None:
    model: Any = small("LlamaForCausalLM", torch.float32)
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    again = read_again(model, tmp_path)
    first, second = (layer.self_attn for layer in again.model.layers)
    assert second.q_proj.weight is first.q_proj.weight
    assert second.k_proj.weight is not first.k_proj.weight


@pytest.mark.parametrize("name", CLASSES)
def test_whatever_is_written_is_read(name: str, tmp_path: Path) -> None:
    model = small(name)
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@language_models
def test_what_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    model = small(name)
    fastattn.nn.apply_lora(model, model.head_layer)
    with pytest.raises(
        ValueError, match=rf"{model.head_layer} are adapted by LoRA; merge .*merge_"
    ):
        model.save_pretrained(tmp_path)
    head_of(model).merge()
    with pytest.raises(ValueError, match="are adapted by LoRA"):
        model.save_pretrained(tmp_path)
    fastattn.nn.merge_lora(model)
    read_again(model, tmp_path, as_transformers=False)
    rows, columns = head_of(model).weight.shape
    replace_head(model, nn.Linear(columns, rows + 3, bias=False))
    shapes = rf"{model.head_layer}\.weight of shape \({rows + 3}, 8\), not \({rows}, 8\)"
    with pytest.raises(ValueError, match=shapes):
        model.save_pretrained(tmp_path)
    replace_head(model, nn.Sequential(nn.Linear(columns, rows)))
    with pytest.raises(ValueError, match=rf"does not have {model.head_layer}\.0\.weight"):
        model.save_pretrained(tmp_path)
    assert type(models.from_pretrained(tmp_path)) is type(model)


class Doubled(nn.Linear):
    """A head of another class."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def with_bias(head: Any) -> nn.Module:
    return nn.Linear(head.in_features, head.out_features, dtype=torch.float64)


def of_another_class(head: Any) -> nn.Module:
    return Doubled(head.in_features, head.out_features, dtype=torch.float64)


def with_a_hook(head: Any) -> nn.Module:
    def tripled(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 3

    layer = with_bias(head)
    layer.register_forward_hook(tripled)
    return layer


def with_a_parametrization(head: Any) -> nn.Module:
    return parametrizations.weight_norm(with_bias(head))


def adapted(head: Any) -> nn.Module:
    layer = fastattn.nn.LoRALinear.from_linear(with_bias(head), rank=2)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    return layer


def ours_with_activation(head: Any) -> nn.Module:
    return fastattn.nn.Linear(
        head.in_features, head.out_features, dtype=torch.float64, activation="relu"
    )


REPLACEMENTS = (
    with_bias,
    of_another_class,
    with_a_hook,
    with_a_parametrization,
    adapted,
    ours_with_activation,
)


@language_models
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_a_replaced_head_gives_logits_and_loss(name: str, replacement: Any) -> None:
    """The loss is that of the logits, and those are what the head gives when it is called."""
    model = small(name)
    old = head_of(model)
    seen: list[torch.Tensor] = []
    handle = old.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    logits_of(model)
    handle.remove()
    torch.manual_seed(3)
    replace_head(model, replacement(old))
    if name.startswith("Bart"):
        model.final_logits_bias.normal_()
    batch = batch_of(model)
    logits = model(**unlabelled(model, batch)).logits
    features = seen[0] if seen else model(**batch).last_hidden_state.detach()
    expected = head_of(model)(features)
    if name.startswith("Bart"):
        expected = expected + model.final_logits_bias
    cap = getattr(model, "softcap", None)
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    torch.testing.assert_close(logits, expected)

    labels = batch["labels"]
    if "decoder_input_ids" not in unlabelled(model, batch) and name != "BertForMaskedLM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted.backward()
    gradients = {n: None if g is None else g.clone() for n, g in gradients_of(model).items()}
    model.zero_grad()
    output = model(**batch)
    torch.testing.assert_close(output.loss, wanted)
    torch.testing.assert_close(output.logits, model(**unlabelled(model, batch)).logits)
    output.loss.backward()
    for parameter, gradient in gradients_of(model).items():
        assert (gradient is None) == (gradients[parameter] is None), parameter
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[parameter], msg=parameter)


@pytest.mark.parametrize("layer", ["wi_0", "wi_1"])
def test_gates_with_biases_keep_them(layer: str) -> None:
    model: Any = small("T5ForConditionalGeneration", feed_forward_proj="gated-gelu")
    gated = model.encoder.block[0].layer[-1].DenseReluDense
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    replaced = with_bias(getattr(gated, layer))
    setattr(gated, layer, replaced)
    gelu = nn.GELU(approximate="tanh")
    torch.testing.assert_close(gated(x), gated.wo(gelu(gated.wi_0(x)) * gated.wi_1(x)))


def test_tables_of_positions_and_segments_are_called() -> None:
    """Hooks of embeddings count where all of their rows are read, too."""
    t5: Any = small("T5ForConditionalGeneration")
    bert: Any = small("BertForMaskedLM")
    relative: Any = fastattn.nn.RelativePositionBias(2)
    attention = fastattn.nn.Attention(8, 2, relative=relative)
    x = torch.randn(1, 4, 8)
    for call, table in (
        (
            lambda: logits_of(t5),
            t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias,
        ),
        (lambda: logits_of(bert), bert.bert.embeddings.token_type_embeddings),
        (lambda: attention(x), relative.relative_attention_bias),
    ):
        before = call()
        handle = table.register_forward_hook(
            lambda _, __, rows: rows * torch.arange(2).repeat(4)[: rows.shape[-1]]
        )
        hooked = call()
        handle.remove()
        assert not torch.allclose(hooked, before)
        torch.testing.assert_close(call(), before)


def test_a_norm_derived_from_ours_is_called() -> None:
    model: Any = small("LlamaForCausalLM")
    norm = type(model.model.norm)

    class Shifted(norm):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1.0

    before = logits_of(model)
    model.model.norm.__class__ = Shifted
    shift = model.lm_head(torch.ones(8, dtype=torch.float64)).detach()
    torch.testing.assert_close(logits_of(model), before + shift)


def test_tied_by_the_configuration_and_different_there(tmp_path: Path) -> None:
    model = small("LlamaForCausalLM", torch.float32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('embeddings": false', 'embeddings": true'))
    with pytest.raises(CheckpointError, match="are tied by the configuration and differ"):
        models.from_pretrained(tmp_path)
