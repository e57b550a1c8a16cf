"""Compare litgpt's tensor parallelism on two processes with one, before and after the patches 04, 05 and 06.

    python extensions/upstream/two_devices.py

Prints, for small models of several families with random weights, the largest difference of a logit. Needs no GPU.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import warnings
from pathlib import Path
from unittest.mock import Mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from check import PATCHES, apply, installed

NAMES = (
    "pythia-14m",
    "Llama-3.2-1B",
    "Qwen2.5-0.5B",
    "Qwen3-0.6B",
    "phi-1_5",
    "phi-2",
    "Gemma-7b",
    "Gemma-2-2b",
    "falcon-40b",
)
SIZES = dict(n_layer=2, n_head=4, n_embd=32, head_size=8, intermediate_size=64, padded_vocab_size=64, block_size=32)


def compare(rank: int, folder: str, port: int, results: mp.SimpleQueue) -> None:
    """Run in one of two processes: put the differences of all models into `results`."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from litgpt import GPT, Config
    from litgpt.generate.tp import tensor_parallel

    differences = []
    for name in NAMES:
        torch.manual_seed(0)
        named = Config.from_name(name)
        groups = 4 if named.n_query_groups == named.n_head else 2
        model = GPT(Config.from_name(name, n_query_groups=groups, **SIZES))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        tokens = torch.randint(64, (1, 12))
        with torch.inference_mode():
            alone = model(tokens)
            both = tensor_parallel(Mock(world_size=2, global_rank=rank), model)(tokens)
        differences.append((both - alone).abs().max().item())
    if rank == 0:
        results.put(differences)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    columns = []
    with tempfile.TemporaryDirectory() as temporary:
        for state in ("before", "after"):
            folder = Path(temporary, state)
            shutil.copytree(installed() / "litgpt", folder / "litgpt")
            for patch in sorted(PATCHES.glob("0[456]_*.patch")) if state == "after" else []:
                apply(patch, folder, "--exclude=tests/*")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            results = mp.get_context("spawn").SimpleQueue()
            mp.spawn(compare, (str(folder), port, results), nprocs=2)
            columns.append(results.get())
    print(f"{'model':14} before   after")
    for name, before, after in zip(NAMES, *columns):
        print(f"{name:14} {before:.1e}  {after:.1e}")


if __name__ == "__main__":
    main()
