"""The switch for results that do not depend on the batch."""

import threading

from .scopes import Scope


class _Choice(threading.local):
    def __init__(self) -> None:
        # Not of the class: Dynamo's guard would look for a choice outside of the thread's own.
        self.batch_invariant = False


_choice = _Choice()


class batch_invariant(Scope):
    """Make bits independent of the batch, inside a `with` block or a decorated function.

    Tiles, and how many programs share a sum, then depend on feature sizes, dtypes and the device
    alone, never on the number of rows, sequences or tokens. A row (a token, a sequence) has the
    same output bits, and its input the same gradient bits, alone, in any batch, anywhere in it,
    padded or packed. All products run on fastattn's kernels, never on cuBLAS, which chooses by the
    number of rows; single rows, and few features after a long sum, then take longer.

    It changes `linear`, `gated_linear`, `grouped_linear`, `mixture`, `linear_cross_entropy`,
    `matmul` (in the rows of its first operand, and the matrices of a batch), `attention` and
    `attention_varlen` (in sequences, and in what is padded behind them and masked) and the modules
    made of them. Norms, softmax, cross entropy, rotations and gated activations have no other
    kernels for other row counts anyway.

    What sums over the batch depends on it: gradients of weights, biases and sinks, and losses
    reduced to a scalar. Dropout is a function of an element's place in the tensor. And layout is
    part of an input: from other strides, or from an address that is no multiple of 16 bytes, a row
    may be read in other pieces and summed in another order. On the reference backend the products
    are PyTorch's own, which promises nothing.

    Args:
        enabled: False for the ordinary choice, inside of a block with the switch on.

    The choice belongs to the thread that made it. A backward pass goes by that of its forward pass,
    wherever it runs, and `torch.compile` compiles anew where the choice has changed.

    Example:
        >>> x, weight = torch.randn(4, 64), torch.ones(64)
        >>> with fastattn.batch_invariant():
        ...     torch.equal(fastattn.rms_norm(x[:1], weight), fastattn.rms_norm(x, weight)[:1])
        True
    """

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"batch_invariant: enabled must be a bool, got {enabled!r}")
        super().__init__(_choice, "batch_invariant", enabled)


def is_batch_invariant() -> bool:
    """Whether this thread has switched batch invariance on."""
    return _choice.batch_invariant
