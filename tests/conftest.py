"""One thread per process, set before torch starts any, so that `ranks.run_ranks` may fork."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch  # noqa: E402

torch.set_num_threads(1)
