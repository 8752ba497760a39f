"""Save a model by torch.distributed.checkpoint from every process under torchrun: `dcp_save.py KIND FOLDER`.

KIND is "rows" (each parameter divided by rows, as FSDP does, unevenly where it must be) or "grid" (by rows and by
columns).
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints import hf_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def main(kind, folder):
    dist.init_process_group("gloo")
    count = dist.get_world_size()
    shape, names = ((count,), ("data",)) if kind == "rows" else ((2, count // 2), ("data", "model"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    state = {}
    for name, tensor in hf_model(kv_heads=2).state_dict().items():
        second = [] if kind == "rows" else [Shard(1) if tensor.ndim == 2 else Replicate()]
        state[name] = distribute_tensor(tensor, mesh, [Shard(0), *second])
    momenta = {name: {"exp_avg": tensor} for name, tensor in state.items()}
    dcp.save({"model": state, "optimizer": {"state": momenta, "step": torch.tensor(3.0)}}, checkpoint_id=folder)
    dist.destroy_process_group()


main(*sys.argv[1:])
