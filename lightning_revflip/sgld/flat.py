"""Many tensors as one."""

from collections.abc import Sequence

import torch
from torch import Tensor


def flat_view(tensors: Sequence[Tensor]) -> Tensor:
    """One dimension over the values of some tensors, which are moved into one piece of memory.

    They stay where they are if they lie there already, so that calls after the first cost little;
    and what has moved them meanwhile, such as `module.to`, does no harm.

    Args:
        tensors: of one dtype and device. Their `data` may be replaced.

    Returns:
        Shape (number of all values,), sharing its memory with each of `tensors`.
    """
    if not _consecutive(tensors):
        flat = torch.cat([each.detach().reshape(-1) for each in tensors])
        parts = torch.split(flat, [each.numel() for each in tensors])
        for each, part in zip(tensors, parts, strict=True):
            each.data = part.view(each.shape)
    count = sum(each.numel() for each in tensors)
    return tensors[0].detach().as_strided((count,), (1,))


def _consecutive(tensors: Sequence[Tensor]) -> bool:
    """Whether the values lie one after the other in one storage."""
    storage = tensors[0].untyped_storage().data_ptr()
    place = tensors[0].data_ptr()
    for each in tensors:
        if (
            each.data_ptr() != place
            or each.untyped_storage().data_ptr() != storage
            or not each.is_contiguous()
        ):
            return False
        place += each.numel() * each.element_size()
    return True
