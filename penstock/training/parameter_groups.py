"""Which parameters decay, and at what share of the learning rate each is trained.

The optimizers divide a model's parameters by it. It must never know more of a model than names.
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.nn import Parameter

from penstock.parallel.replicas import local

NamedParameters = list[tuple[str, Parameter]]
Kernel = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Machine code: tensors in, tensors out, or in place."""


def go_on() -> None:
    """What an optimizer does before it changes its state, where nobody else reads that."""


class Trained:
    """The parameters an optimizer updates, by name: what all optimizers have in common."""

    before_step: Callable[[], None] = staticmethod(go_on)
    """Called before the state changes: a checkpoint may still be copying it."""
    squares: Kernel | None = None
    """What `gradient_norm.global_norm` may use."""
    _adamw_kernel: Kernel | None = None
    _parameters: dict[str, Parameter]
    _steps = 0

    def use_kernels(self, adamw: Kernel, squares: Kernel) -> None:
        """Use the kernels of these names (`compiler/update.py`) where they fit from now on."""
        self._adamw_kernel, self.squares = adamw, squares

    @property
    def steps(self) -> int:
        """Updates applied so far."""
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        """Go on after `value` updates, as a resumed run does."""
        self._steps = value

    @property
    def names(self) -> list[str]:
        """Names of the trainable parameters, in the order of `gradients`."""
        return list(self._parameters)

    def gradients(self) -> list[Tensor]:
        """The gradients that `step` will use, in its order; of divided ones this process's rows.

        Raises:
            RuntimeError: a parameter took no part in the loss.
        """
        found: list[Tensor] = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient")
            found.append(local(parameter.grad))
        return found

    def zero_gradients(self) -> None:
        """Drop all gradients; the next backward pass makes new ones."""
        for parameter in self._parameters.values():
            parameter.grad = None


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]], decay_all: bool
) -> tuple[NamedParameters, NamedParameters]:
    """Divide the trainable parameters into those that decay and those that do not.

    Matrices decay; embeddings (`embed.*`, so also a head tied to one), norms and biases do not.

    Source: GPT-2's and GPT-3's practice, as nanoGPT states it, but embeddings are left out too.

    Args:
        named_parameters: a model's `named_parameters()`; a tied parameter comes once, by its
            first name.
        decay_all: decay everything.

    Returns:
        The decaying and the other (name, parameter) pairs, each in the order given.
    """
    decayed: NamedParameters = []
    others: NamedParameters = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.startswith("embed.")
            (decayed if decay_all or is_matrix else others).append((name, parameter))
    return decayed, others


def learning_rate_shares(
    names: Iterable[str], layer_decay: float, layers: int | None = None
) -> dict[str, float]:
    """Of each parameter, the share of the learning rate it is trained at: 1 in the head, and
    `layer_decay` times as much in each region before, down to the embedding.

    Source: Clark et al., ELECTRA, arXiv 2003.10555, appendix B.

    Args:
        names: parameter names, frozen ones too.
        layer_decay: factor from a layer to the one before it.
        layers: those of the whole model; as many as `names` are of, when not given.
    """
    names = list(names)
    numbers = {name: int(name.split(".")[1]) for name in names if name.startswith("blocks.")}
    count = 1 + max(numbers.values(), default=-1) if layers is None else layers
    shares: dict[str, float] = {}
    for name in names:
        below = 0 if name.startswith("head.") else count + 1
        shares[name] = layer_decay ** (count - numbers[name] if name in numbers else below)
    return shares
