"""The size of the training set, as callbacks of a Trainer learn it."""

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DistributedSampler

from lightning_revflip.flipout.elbo import check_num_data


def resolve_num_data(num_data: int | None, loader: Any, owner: str) -> int:
    """The number of training examples, as given or else from the training data loader.

    Args:
        num_data: as given; None: that of the loader.
        loader: of the training data.
        owner: class of the callback, for messages.

    Raises:
        ValueError: if it is not given and cannot be known, or is no positive number.

    Warns:
        UserWarning: if it is given and the loader has another number.
    """
    if num_data is None:
        return dataset_size(loader, owner)
    check_num_data(num_data)
    try:
        found = dataset_size(loader, owner)
    except ValueError:
        return num_data
    if found != num_data:
        rank_zero_warn(
            f"{owner}(num_data={num_data}) differs from the {found} items of the training data "
            "set. That is right if the loss is a mean over other units than items, for example "
            f"over tokens; otherwise give {found}."
        )
    return num_data


def dataset_size(loader: Any, owner: str) -> int:
    """The number of items of a loader's `dataset`, those of all processes together.

    Raises:
        ValueError: if it cannot be known.
    """
    give = f"Give {owner}(num_data=...), the number of training examples."
    if not hasattr(loader, "dataset"):
        raise ValueError(
            "The number of training examples is not known: the training data is a "
            f"{type(loader).__name__}, not one loader with a `dataset`. {give}"
        )
    try:
        size = len(loader.dataset)
    except (TypeError, NotImplementedError):
        raise ValueError(
            "The number of training examples is not known: the data set, a "
            f"{type(loader.dataset).__name__}, has no length. {give}"
        ) from None
    sampler = getattr(loader, "sampler", None)
    # A distributed sampler knows the samples of all processes by what it divides.
    drawn: Any = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler
    if hasattr(drawn, "__len__") and len(drawn) != size:
        raise ValueError(
            f"The number of training examples is not clear: the data set has {size} items, and its "
            f"{type(sampler).__name__} draws {len(drawn)} of them. {give}"
        )
    if size < 1:
        raise ValueError(f"The training data set is empty. {give}")
    return size
