"""What both cross entropies are tried on, and how the targets and class weights are made."""

from collections.abc import Callable

import torch

from .core.catalog import Normal, Sample


def targets(
    shape: tuple[int, ...], classes: int, ignored: int | None = None
) -> Callable[[str | torch.device], torch.Tensor]:
    """Class indices, every third of which is `ignored` if that is given."""

    def make(device: str | torch.device) -> torch.Tensor:
        place = torch.arange(torch.Size(shape).numel())
        target = (place * 7919 + 2) % classes
        if ignored is not None:
            target = torch.where(place % 3 == 1, ignored, target)
        return target.reshape(shape).to(device)

    return make


def class_weights(classes: int) -> Callable[[str | torch.device], torch.Tensor]:
    """Weights of order one."""
    return lambda device: torch.linspace(0.5, 2.0, classes, device=device)


SAMPLES = (
    Sample(
        "smallest",
        logits=(4, 5),
        target=targets((4,), 5, ignored=-100),
        weight=class_weights(5),
        label_smoothing=0.1,
        z_loss=0.01,
        logit_scale=0.8,
        softcap=3.0,
    ),
    Sample(
        "a loss a row",
        logits=(3, 7, 64),
        target=targets((3, 7), 64, ignored=2),
        ignore_index=2,
        reduction="none",
        z_loss=1e-3,
        return_lse=True,
    ),
    Sample("mean", logits=(37, 131), target=targets((37,), 131, ignored=-100)),
    Sample("sum", logits=(9, 1000), target=targets((9,), 1000), reduction="sum"),
    Sample(
        "weighted mean",
        logits=(9, 72),
        target=targets((9,), 72, ignored=-1),
        weight=class_weights(72),
        ignore_index=-1,
    ),
    Sample("label smoothing", logits=(9, 72), target=targets((9,), 72), label_smoothing=0.3),
    Sample("softcap", logits=Normal((9, 72), scale=5.0), target=targets((9,), 72), softcap=6.0),
    Sample(
        "logit scale",
        logits=Normal((9, 72), scale=20.0),
        target=targets((9,), 72, ignored=0),
        ignore_index=0,
        logit_scale=0.0625,
    ),
    Sample(
        "everything, several tiles a row",
        logits=(5, 9001),
        target=targets((5,), 9001, ignored=0),
        weight=class_weights(9001),
        ignore_index=0,
        reduction="none",
        label_smoothing=0.1,
        z_loss=1e-4,
        logit_scale=3.0,
        softcap=30.0,
        return_lse=True,
    ),
    Sample(
        "far from zero",
        logits=Normal((4, 50), scale=10.0, mean=1000.0),
        target=targets((4,), 50),
        label_smoothing=0.1,
    ),
    Sample("one class", logits=(5, 1), target=targets((5,), 1), z_loss=0.1),
    Sample("one row", logits=(33,), target=targets((), 33)),
    Sample("no rows", logits=(0, 16), target=targets((0,), 16), reduction="sum"),
)

LINEAR_SAMPLES = (
    Sample(
        "smallest",
        x=(4, 3),
        weight=(5, 3),
        bias=(5,),
        target=targets((4,), 5, ignored=-100),
        class_weight=class_weights(5),
        label_smoothing=0.1,
        z_loss=0.01,
        logit_scale=0.8,
        softcap=3.0,
        chunk_rows=3,
    ),
    Sample(
        "a loss a row",
        x=(3, 7, 24),
        weight=(33, 24),
        target=targets((3, 7), 33, ignored=2),
        ignore_index=2,
        reduction="none",
        z_loss=1e-3,
        return_lse=True,
    ),
    Sample(
        "mean, several chunks",
        x=(37, 19),
        weight=(131, 19),
        target=targets((37,), 131, ignored=-100),
        chunk_rows=16,
    ),
    Sample(
        "sum with a bias, whole chunks",
        x=(2, 8, 32),
        weight=(64, 32),
        bias=(64,),
        target=targets((2, 8), 64),
        reduction="sum",
        chunk_rows=8,
    ),
    Sample(
        "weighted mean",
        x=(9, 16),
        weight=(72, 16),
        target=targets((9,), 72, ignored=-1),
        class_weight=class_weights(72),
        ignore_index=-1,
    ),
    Sample(
        "mean and lse, several chunks",
        x=(9, 16),
        weight=(40, 16),
        bias=(40,),
        target=targets((9,), 40, ignored=0),
        ignore_index=0,
        label_smoothing=0.2,
        return_lse=True,
        chunk_rows=4,
    ),
    Sample(
        "everything, a loss a row, several chunks",
        x=Normal((23, 16), scale=2.0),
        weight=(50, 16),
        bias=(50,),
        target=targets((23,), 50, ignored=0),
        class_weight=class_weights(50),
        ignore_index=0,
        reduction="none",
        label_smoothing=0.1,
        z_loss=1e-3,
        logit_scale=2.5,
        softcap=8.0,
        chunk_rows=8,
    ),
    Sample(
        "logit scale, several chunks",
        x=Normal((23, 16), scale=4.0),
        weight=(50, 16),
        target=targets((23,), 50, ignored=0),
        ignore_index=0,
        logit_scale=0.1,
        return_lse=True,
        chunk_rows=8,
    ),
    Sample("one row", x=(20,), weight=(33, 20), target=targets((), 33)),
    Sample("one class", x=(33, 8), weight=(1, 8), target=targets((33,), 1), z_loss=0.1),
    Sample("no rows", x=(0, 8), weight=(6, 8), target=targets((0,), 6), reduction="sum"),
)
