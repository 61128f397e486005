"""One thread per process, set before torch starts any, so that `ranks.run_ranks` may fork."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch

import megatron_fipo.model  # noqa: F401  (the CPU platform, before any test imports Megatron-Core)

torch.set_num_threads(1)
