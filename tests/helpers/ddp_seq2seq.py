"""Gradients of a translation model in one or more processes: `... ddp_seq2seq DIR RANK N`."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.seq2seq import Batch, batch, translator

SOURCE_LENGTHS, TARGET_LENGTHS = (5, 2, 7, 1, 3, 3, 8, 4), (3, 6, 1, 4, 8, 2, 5, 7)


def part(rank: int, processes: int) -> Batch:
    """The sentences of a process."""
    whole = batch(SOURCE_LENGTHS, TARGET_LENGTHS)
    mine = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    return Batch(
        whole.source[:, mine],
        whole.source_lengths[mine],
        whole.tokens[:, mine],
        whole.targets[:, mine],
        whole.target_lengths[mine],
    )


def main(folder: Path, rank: int, processes: int) -> None:
    """Write the gradients of the loss of 8 sentences, divided among the processes."""
    translation = translator(num_layers=2)
    model = translation
    if processes > 1:
        store = f"file://{folder / 'store'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        model = DistributedDataParallel(translation)
    for _ in range(2):  # the second time DDP has rebuilt its buckets
        translation.zero_grad()
        loss, _ = model(part(rank, processes))
        (loss * processes).backward()  # DDP divides the sum by the number of processes
    if rank == 0:
        found = {name: p.grad for name, p in translation.named_parameters()}
        torch.save(found, folder / f"{processes}.pt")
    if processes > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
