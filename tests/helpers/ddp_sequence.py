"""Gradients of a ReversibleSequence in one or more processes: `... ddp_sequence DIR RANK N`."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.sequences import language_model, tokens


def main(folder: Path, rank: int, processes: int) -> None:
    """Write the gradients of the mean loss over 8 sequences, divided among the processes."""
    sequence = language_model(num_layers=2, chunk_steps=3)
    mine = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    x, y = tokens(9, 8)[:, mine], tokens(9, 8, seed=1)[:, mine]
    model = sequence
    if processes > 1:
        store = f"file://{folder / 'store'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        model = DistributedDataParallel(sequence)
    for _ in range(2):  # the second time DDP has rebuilt its buckets
        sequence.zero_grad()
        loss, _ = model(x, None, y)
        (loss * processes).backward()  # DDP divides the sum by the number of processes
    if rank == 0:
        torch.save({n: p.grad for n, p in sequence.named_parameters()}, folder / f"{processes}.pt")
    if processes > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
