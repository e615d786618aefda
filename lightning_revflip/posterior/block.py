"""The samples of a shard that is not on the disk yet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_revflip.posterior.layout import Layout, Parameters
from lightning_revflip.posterior.manifest import dtype_name
from lightning_revflip.posterior.shards import DTYPE_NAMES, Samples


class Block:
    """Memory for a fixed number of samples, allocated once, into which they are copied.

    Args:
        size: number of samples.
        layout: their parameters.
        dtype: in which parameters are stored.
        buffer_layout: their buffers; None: they have none.
        buffer_dtypes: dtypes of the buffers; empty: those of the first sample.
    """

    def __init__(
        self,
        size: int,
        layout: Layout,
        dtype: torch.dtype,
        buffer_layout: Layout | None,
        buffer_dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self._layout = layout
        self._rows = torch.empty(size, layout.numel, dtype=dtype)
        self._flat = torch.empty(layout.numel)
        self._largest_square = min(torch.finfo(dtype).max ** 2, torch.finfo(torch.float32).max)
        self._buffer_layout = buffer_layout
        self._buffers: Parameters = {}
        self._allocate_buffers(buffer_dtypes)
        self._used = 0
        self._samples: dict[int, tuple[int, int]] = {}  # serial number: slot, step

    @property
    def room(self) -> int:
        """How many samples can still be put in; one that was dropped makes no room."""
        return len(self._rows) - self._used

    def __len__(self) -> int:
        return len(self._samples)

    def __contains__(self, serial: int) -> bool:
        return serial in self._samples

    def put(
        self,
        serial: int,
        step: int,
        parameters: Mapping[str, Tensor] | Tensor,
        buffers: Mapping[str, Tensor] | None,
    ) -> None:
        """Copy a sample; all or nothing.

        Raises:
            ValueError: for other names, shapes or dtypes than expected, and values that are not
                finite or not finite in the dtype of storage.
        """
        self._put_row(self._rows[self._used], step, parameters)
        self._put_buffers(buffers)
        self._samples[serial] = self._used, step
        self._used += 1

    def drop(self, serial: int) -> None:
        """Forget a sample."""
        del self._samples[serial]

    def clear(self) -> None:
        """Forget all samples."""
        self._samples.clear()
        self._used = 0

    def samples(self) -> Samples:
        """The samples by serial number; views of the memory, unless some were dropped."""
        slots = [slot for slot, _ in self._samples.values()]
        if len(slots) == self._used:
            chosen: slice | list[int] = slice(self._used)
        else:
            chosen = slots
        return Samples(
            serials=list(self._samples),
            steps=[step for _, step in self._samples.values()],
            rows=self._rows[chosen],
            buffers={name: values[chosen] for name, values in self._buffers.items()},
        )

    def _put_row(self, row: Tensor, step: int, parameters: Mapping[str, Tensor] | Tensor) -> None:
        if not isinstance(parameters, Tensor):
            values = self._layout.flatten(parameters, out=self._flat)
        elif parameters.shape == row.shape:
            values = parameters.detach().to("cpu", torch.float32)
        else:
            raise ValueError(
                f"a sample as one row must have shape {tuple(row.shape)}, got "
                f"{tuple(parameters.shape)}."
            )
        row.copy_(values)
        # No value is larger than the root of the sum of squares, which is quick to compute; a NaN
        # makes the comparison false.
        if not torch.dot(values, values).item() <= self._largest_square:
            self._check_finite(row, step, parameters)

    def _check_finite(
        self, row: Tensor, step: int, parameters: Mapping[str, Tensor] | Tensor
    ) -> None:
        """Name the first parameter that is not finite, if there is one."""
        if isinstance(parameters, Tensor):
            given = self._layout.unflatten(parameters[None])
        else:
            given = dict(parameters)
        stored = self._layout.unflatten(row[None])
        for name in self._layout.names:
            if not given[name].isfinite().all():
                raise ValueError(
                    f"the sample of step {step} has NaN or infinite values in {name!r}, so it was "
                    "not stored; the samples before are unharmed. The chain has diverged: lower "
                    "the step size."
                )
            if not stored[name].isfinite().all():
                largest = given[name].abs().max().item()
                raise ValueError(
                    f"the sample of step {step} has values up to {largest:.3g} in {name!r}, more "
                    f"than {dtype_name(row.dtype)} holds, so it was not stored. Make the bank with "
                    "dtype=torch.bfloat16 or torch.float32; if the chain has diverged, lower the "
                    "step size."
                )

    def _put_buffers(self, buffers: Mapping[str, Tensor] | None) -> None:
        if self._buffer_layout is None:
            if buffers is not None:
                raise ValueError(
                    f"got the buffers {', '.join(buffers)}, but the bank was made without. Give "
                    "buffer_layout to the writer to store them."
                )
            return
        if buffers is None:
            raise ValueError(
                f"the buffers {', '.join(self._buffer_layout.names)} are missing; the bank was "
                "made to store them with each sample."
            )
        self._buffer_layout.check_tensors(buffers)
        if not self._buffers:
            self._allocate_buffers({name: tensor.dtype for name, tensor in buffers.items()})
        for name, values in self._buffers.items():
            if buffers[name].dtype != values.dtype:
                raise ValueError(
                    f"the buffer {name!r} is {dtype_name(buffers[name].dtype)}, but was "
                    f"{dtype_name(values.dtype)} in earlier samples."
                )
        for name, values in self._buffers.items():
            values[self._used].copy_(buffers[name])

    def _allocate_buffers(self, dtypes: Mapping[str, torch.dtype]) -> None:
        for name, dtype in dtypes.items():
            if dtype not in DTYPE_NAMES:
                raise ValueError(
                    f"the buffer {name!r} is {dtype_name(dtype)}, which cannot be stored. Leave it "
                    "out of buffer_layout."
                )
        if self._buffer_layout is not None and dtypes:
            self._buffers = {
                name: torch.empty(len(self._rows), *shape, dtype=dtypes[name])
                for name, shape in self._buffer_layout.by_name.items()
            }
