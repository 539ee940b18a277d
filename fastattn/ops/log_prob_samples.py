"""What the ops of log-probabilities are tried on."""

from .core.catalog import Normal, Sample
from .cross_entropy_samples import targets

SAMPLES = (
    Sample(
        "smallest",
        logits=(4, 5),
        target=targets((4,), 5, ignored=-100),
        temperature=0.7,
        softcap=3.0,
        logit_scale=0.8,
        return_entropy=True,
    ),
    Sample(
        "with entropies",
        logits=(3, 7, 64),
        target=targets((3, 7), 64, ignored=2),
        ignore_index=2,
        temperature=1.5,
        return_entropy=True,
    ),
    Sample("odd width", logits=(37, 131), target=targets((37,), 131, ignored=-100)),
    Sample(
        "everything, several tiles a row",
        logits=(5, 9001),
        target=targets((5,), 9001, ignored=0),
        ignore_index=0,
        temperature=0.3,
        softcap=30.0,
        logit_scale=3.0,
        return_entropy=True,
    ),
    Sample(
        "far from zero",
        logits=Normal((4, 50), scale=3.0, mean=1000.0),
        target=targets((4,), 50),
        return_entropy=True,
    ),
    Sample("one class", logits=(5, 1), target=targets((5,), 1)),
    Sample("one row", logits=(33,), target=targets((), 33), return_entropy=True),
    Sample("no rows", logits=(0, 16), target=targets((0,), 16), return_entropy=True),
)

LINEAR_SAMPLES = (
    Sample(
        "smallest",
        x=(4, 3),
        weight=(5, 3),
        bias=(5,),
        target=targets((4,), 5, ignored=-100),
        temperature=0.7,
        softcap=3.0,
        logit_scale=0.8,
        return_entropy=True,
        chunk_rows=3,
    ),
    Sample(
        "with entropies",
        x=(3, 7, 24),
        weight=Normal((33, 24), scale=0.2),
        target=targets((3, 7), 33, ignored=2),
        ignore_index=2,
        temperature=1.5,
        return_entropy=True,
    ),
    Sample(
        "several chunks",
        x=(37, 19),
        weight=(131, 19),
        bias=(131,),
        target=targets((37,), 131, ignored=-100),
        logit_scale=0.5,
        chunk_rows=16,
    ),
    Sample("one row", x=(20,), weight=(33, 20), target=targets((), 33), return_entropy=True),
    Sample("no rows", x=(0, 8), weight=(6, 8), target=targets((0,), 6)),
)
