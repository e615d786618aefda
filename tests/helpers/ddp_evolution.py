"""FlipoutES in one or more processes: `python -m tests.helpers.ddp_evolution DIR RANK N`."""

import sys
from pathlib import Path

import torch
from torch import distributed, nn

from lightning_revflip.flipout.evolution import FlipoutES


def main(folder: Path, rank: int, processes: int) -> None:
    """Write the parameters after a few generations, and the fitness of the last one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    es = FlipoutES(model, 0.1, population=24, base_perturbations=3, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    if processes > 1:
        store = f"file://{folder / 'store'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        es.share(rank, processes)
    for _ in range(5):
        with es.members():
            logits, labels = model(es.repeat(x, 4)), es.repeat(y, 4)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        fitness = es.gradient(-losses.view(es.local_population, 4).mean(1))
        optimizer.step()
        es.next_generation()
    if rank == 0:
        torch.save({**model.state_dict(), "fitness": fitness}, folder / f"{processes}.pt")
    if processes > 1:
        es.seed += rank
        try:
            es.gradient(torch.zeros(es.local_population))
        except ValueError as error:
            (folder / f"error{rank}").write_text(str(error))
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
