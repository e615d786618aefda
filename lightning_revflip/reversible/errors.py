"""The error of a reversal that went wrong."""


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
