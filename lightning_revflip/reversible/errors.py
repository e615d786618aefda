"""Errors of backward passes: a reversal that went wrong, and gradients of gradients."""

import torch


class ReversalError(RuntimeError):
    """The backward sweep did not arrive at the state from which the forward sweep started."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"Reversing the recurrence did not restore its initial state: {found}. Its gradients "
            "would be wrong. Likely causes: a weight, a bias, the input or the initial state was "
            "changed in place between forward and backward (an optimizer step, weight drop, "
            "`.data`); the number of threads changed in between; matrix products that are not "
            "deterministic. Call backward() before you change anything, or clone what you change."
        )


def refuse_double_backward(what: str, instead: str) -> None:
    """Raise if the running backward pass is itself to be differentiated.

    torch's `once_differentiable` lets it through in silence where the incoming gradient requires
    none.

    Args:
        what: is differentiated, for the message.
        instead: what can be differentiated twice.

    Raises:
        RuntimeError: if gradients are enabled in the backward pass (create_graph=True).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"double backward through {what} is not supported: its gradient cannot be "
            f"differentiated again (create_graph=True). Use {instead} for this."
        )
