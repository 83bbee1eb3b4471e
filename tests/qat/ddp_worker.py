"""One of two processes that train a model together; writes what it ends up with."""

from __future__ import annotations

import math
import sys

import torch
import torch.distributed as dist
from qat_models import mean_square
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import halfbyte as hb


def main(rank: int, store: str, result: str, weights: str, activations: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    hb.prepare_qat_(model, hb.int_static(4, 8), weights=weights, activations=activations)
    parallel = DistributedDataParallel(model)
    scales = {id(p) for p in hb.qat.scale_parameters(model)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in scales], "lr": 0.05},
        {"params": [p for p in model.parameters() if id(p) in scales], "lr": 0.01},
    ]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]])
    generator = torch.Generator().manual_seed(rank)
    extremes = []
    for i in range(5):
        x = (1 + rank) * torch.randn(8, 16, generator=generator)
        if i in (0, 3) and rank == 1:  # also the first, which gives trained ranges
            x = x[:0]
        extremes.append((x.amin(), x.amax()) if x.numel() else (torch.tensor(math.inf), torch.tensor(-math.inf)))
        optimizer.zero_grad()
        y = parallel(x)
        (mean_square(y) if x.numel() else y.sum()).backward()
        optimizer.step()
    model.eval()
    report = hb.convert_(model, progress=False)
    assert report.modules
    torch.save({"state": model.state_dict(), "extremes": extremes}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
