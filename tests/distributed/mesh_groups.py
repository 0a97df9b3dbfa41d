"""One rank of `test_mesh_groups.py`: sums over axes, by the mesh and by torch's `DeviceMesh`."""

from __future__ import annotations

import json

import torch
from torch.distributed import all_reduce
from torch.distributed.device_mesh import DeviceMesh

from picotron_core.parallel.mesh import make_mesh
from picotron_core.parallel.world import join
from picotron_core.registry.plugins import load_registry


def main() -> None:
    world = join(timeout_s=60)
    candidates = load_registry().candidates
    comm = next(c for c in candidates if c.backend.name == "gloo-cpu").backend.load()
    cpu = torch.device("cpu")
    comm.start(store=world.store, rank=world.rank, world_size=world.size, device=cpu, timeout_s=60)
    told = []
    for degrees in ({"pp": 2, "tp": 2}, {"tp": 4}):
        mesh = make_mesh(comm, rank=world.rank, world_size=world.size, **degrees)
        torchs = mesh.device_mesh
        assert isinstance(torchs, DeviceMesh)
        sums = {}
        for name in torchs.mesh_dim_names or ():
            ours, theirs = (torch.tensor(10**world.rank) for _ in range(2))
            getattr(mesh, name).all_reduce(ours)
            all_reduce(theirs, group=torchs[name].get_group())
            sums[name] = [int(ours), int(theirs)]
        told.append(
            {
                "names": torchs.mesh_dim_names,
                "shape": torchs.shape,
                "place": torchs.get_coordinate(),
                "sums": sums,
            }
        )
    comm.stop()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
