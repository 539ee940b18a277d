"""One training step of each family of models: the loss, and the gradients of all parameters.

Beside ours stand the same model in PyTorch (Llama of PyTorch's modules, the others with every op
by the reference backend), eager and compiled, and transformers' own. Tokens per second follow from
the time of both directions and the tokens of a shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastattn.demo.plain import PlainLlama
from fastattn.models import Config, model_class
from fastattn.models.bart import BartConfig
from fastattn.models.bert import BertConfig
from fastattn.models.gemma import Gemma2Config
from fastattn.models.gpt2 import GPT2Config
from fastattn.models.llama import LlamaConfig
from fastattn.models.t5 import T5Config
from fastattn.models.vit import ViTConfig
from fastattn.ops.core.backends import backend
from fastattn.ops.core.catalog import Normal

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic, shape_name

INPUTS = ("input_ids", "pixel_values")
HEAD_DIM, PATCH, CLASSES = 64, 16, 1000

Parameters = dict[str, torch.Tensor]

# Replaced in this order.
VIT_NAMES = {
    ".encoder.layer.": ".layers.",
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}

# Batch, tokens of a sequence, width and layers.
SIZES = [(8, 1024, 1024, 8), (4, 2048, 2048, 4)]
SMALL_SIZES = [(2, 64, 128, 2), (1, 128, 256, 1)]
SMALL = (2, 16, 64, 1)


@dataclass(frozen=True, eq=False)
class TrainingStep(Op):
    """A model as an op of its parameters, which gives the loss; PyTorch's is its reference."""

    @property
    def reference(self) -> Callable[..., Any]:
        """The model in PyTorch."""
        assert self.torch is not None
        return self.torch


def heads_of(width: int) -> int:
    return max(1, width // HEAD_DIM)


def vocabulary(width: int) -> int:
    """About as many parameters as in models that people train; few where a step shall be short."""
    return 32 * width


def gated_width(width: int) -> int:
    return -(-8 * width // (3 * 64)) * 64


def llama(length: int, width: int, layers: int) -> Config:
    return LlamaConfig(
        vocab_size=vocabulary(width),
        hidden_size=width,
        intermediate_size=gated_width(width),
        num_hidden_layers=layers,
        num_attention_heads=heads_of(width),
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )


def gemma2(length: int, width: int, layers: int) -> Config:
    return Gemma2Config(
        vocab_size=vocabulary(width),
        hidden_size=width,
        intermediate_size=gated_width(width),
        num_hidden_layers=layers,
        num_attention_heads=heads_of(width),
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        max_position_embeddings=length,
        sliding_window=length // 2,
        pad_token_id=None,
    )


def gpt2(length: int, width: int, layers: int) -> Config:
    return GPT2Config(
        vocab_size=vocabulary(width),
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=heads_of(width),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def bert(length: int, width: int, layers: int) -> Config:
    return BertConfig(
        vocab_size=vocabulary(width),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads_of(width),
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
    )


def t5(length: int, width: int, layers: int) -> Config:
    return T5Config(
        vocab_size=vocabulary(width),
        d_model=width,
        d_kv=HEAD_DIM,
        d_ff=gated_width(width),
        num_layers=layers,
        num_heads=heads_of(width),
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )


def bart(length: int, width: int, layers: int) -> Config:
    return BartConfig(
        vocab_size=vocabulary(width),
        max_position_embeddings=length,
        d_model=width,
        encoder_layers=layers,
        encoder_ffn_dim=4 * width,
        encoder_attention_heads=heads_of(width),
        decoder_layers=layers,
        decoder_ffn_dim=4 * width,
        decoder_attention_heads=heads_of(width),
        dropout=0.0,
    )


def vit(length: int, width: int, layers: int) -> Config:
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads_of(width),
        intermediate_size=4 * width,
        image_size=PATCH * math.isqrt(length),
        patch_size=PATCH,
        num_labels=CLASSES,
    )


@dataclass(frozen=True)
class Family:
    """A head, and its configuration for sequences of a length, a width and some layers."""

    head: str
    configure: Callable[[int, int, int], Config]
    attentions: int = 1
    """For each layer that is counted."""

    def ours(self, config: Config, dtype: torch.dtype) -> nn.Module:
        chosen = model_class({"model_type": config.model_type, "architectures": [self.head]})
        return chosen(config).to(dtype)

    def plain(self, config: Config, dtype: torch.dtype) -> nn.Module:
        llama = isinstance(config, LlamaConfig)
        return PlainLlama(config).to(dtype) if llama else self.ours(config, dtype)

    def of_transformers(self, config: Config, dtype: torch.dtype) -> nn.Module:
        import transformers

        values = config.to_dict()
        theirs = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        return getattr(transformers, self.head)._from_config(theirs, dtype=dtype)


FAMILIES = {
    "models.llama": Family("LlamaForCausalLM", llama),
    "models.gemma, Gemma 2": Family("Gemma2ForCausalLM", gemma2),
    "models.gpt2": Family("GPT2LMHeadModel", gpt2),
    "models.bert": Family("BertForMaskedLM", bert),
    "models.t5": Family("T5ForConditionalGeneration", t5, attentions=3),
    "models.bart": Family("BartForConditionalGeneration", bart, attentions=3),
    "models.vit": Family("ViTForImageClassification", vit),
}


def parameters_of(family: Family, length: int, width: int, layers: int) -> Parameters:
    """Names and shapes, without memory."""
    with torch.device("meta"):
        model = family.ours(family.configure(length, width, layers), torch.float32)
    return dict(model.named_parameters())


def tokens(batch: int, length: int, below: int, step: int) -> Callable[[Any], torch.Tensor]:
    """Tokens all over the vocabulary."""
    places = range(batch * length)
    return lambda device: torch.tensor(
        [place * step % below for place in places], device=device
    ).view(batch, length)


def arguments(family: Family) -> Callable[..., dict[str, Any]]:
    """What the model reads, and the parameters about as large as when drawn."""

    def at(batch: int, length: int, width: int, layers: int) -> dict[str, Any]:
        given: dict[str, Any] = {"sizes": shape_name((length, width, layers))}
        if family.configure is vit:
            side = PATCH * math.isqrt(length)
            given["pixel_values"] = Normal((batch, 3, side, side))
            given["labels"] = lambda device: torch.arange(batch, device=device) % CLASSES
        else:
            classes = vocabulary(width)
            given["input_ids"] = tokens(batch, length, classes, 7919)
            given["labels"] = tokens(batch, length, classes, 7907)
        for name, parameter in parameters_of(family, length, width, layers).items():
            scale = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            # Norms are about 1, but Gemma's weights are what is added to it.
            norm = name.endswith("weight") and parameter.dim() == 1
            mean = float(norm and family.configure is not gemma2)
            given[name] = Normal(tuple(parameter.shape), scale=scale, mean=mean)
        return given

    return at


def run(
    family: Family, make: Callable[[Config, torch.dtype], nn.Module]
) -> Callable[..., torch.Tensor]:
    """The loss of a model as a function of its sizes, what it reads, and its parameters."""
    models: dict[Any, nn.Module] = {}

    def call(sizes: str, labels: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        read = {name: given.pop(name) for name in INPUTS if name in given}
        dtype = next(iter(given.values())).dtype
        key = (sizes, labels.device, dtype)
        if key not in models:
            config = family.configure(*map(int, sizes.split("x")))
            with torch.device(labels.device):
                models[key] = make(config, dtype).train()
        read["labels"] = labels
        return torch.func.functional_call(models[key], given, (), read).loss

    return call


def by_transformers(family: Family) -> Callable[..., torch.Tensor]:
    """transformers' model, which for ViT has other names inside than its checkpoints."""
    call = run(family, family.of_transformers)

    def in_transformers(**given: Any) -> torch.Tensor:
        if family.configure is vit:
            for old, new in VIT_NAMES.items():
                given = {name.replace(old, new): value for name, value in given.items()}
        return call(**given)

    return in_transformers


def by_pytorch(family: Family) -> Callable[..., torch.Tensor]:
    """The model in PyTorch, with every op of ours that is in it by the reference backend."""
    call = run(family, family.plain)

    def in_pytorch(**given: Any) -> torch.Tensor:
        with backend("reference"):
            return call(**given)

    return in_pytorch


def flops(family: Family) -> Callable[[Shape], dict[str, float]]:
    """Products of every token with the matrices, and those of queries, keys and values.

    An embedding is looked up, but where it is the head too its product is counted, which is the
    same number; positions are not worth telling apart.
    """

    def at(shape: Shape) -> dict[str, float]:
        batch, length, width, layers = shape
        parameters = parameters_of(family, length, width, layers).values()
        products = 2.0 * batch * length * sum(p.numel() for p in parameters if p.dim() == 2)
        scores = family.attentions * layers * 4.0 * batch * length * length * width
        return {FORWARD: products + scores, BACKWARD: 2.0 * products + 2.5 * scores}

    return at


def traffic(family: Family) -> Callable[[Shape, torch.dtype, Any], dict[str, Traffic]]:
    """Inputs, parameters and the loss; beyond those, what each product writes is read again.

    The backward reads those tensors again and moves as many of its own, and writes gradients.
    """

    def at(shape: Shape, dtype: torch.dtype, target: Any) -> dict[str, Traffic]:
        batch, length, width, layers = shape
        parameters = list(parameters_of(family, length, width, layers).values())
        weights = sum(p.numel() for p in parameters) * dtype.itemsize
        if family.configure is vit:
            read = batch * 3 * (PATCH * math.isqrt(length)) ** 2 * dtype.itemsize + 8 * batch
        else:
            read = 2 * 8 * batch * length
        # In the order of rows and columns that most of them have; the head writes no logits.
        columns = sum(p.shape[0] for p in parameters if p.dim() == 2 and p.shape[0] <= 8 * width)
        between = 2 * batch * length * columns * dtype.itemsize
        loss = 8 if dtype is torch.float64 else 4
        least = read + weights + loss
        return {
            FORWARD: Traffic(least, least + between),
            BACKWARD: Traffic(least + weights, least + weights + 2 * between),
        }

    return at


OPS = tuple(
    TrainingStep(
        name,
        run(family, family.ours),
        arguments(family),
        # Its kernels are compiled where their ops are.
        shapes=[],
        quick_shapes=[],
        small=SMALL,
        dtypes=(torch.bfloat16,),
        torch=by_pytorch(family),
        benchmark=Benchmark(
            SIZES,
            SMALL_SIZES,
            traffic(family),
            {"transformers": partial(by_transformers, family)},
            flops=flops(family),
            tokens=lambda shape: shape[0] * shape[1],
            by_kernels=False,
            in_float64=lambda shape: shape[2] <= 128,
        ),
    )
    for name, family in FAMILIES.items()
)
