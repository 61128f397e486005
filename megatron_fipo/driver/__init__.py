"""The driver: the process of `megatron-fipo train`. Importing it loads neither torch nor Megatron-Core."""

import os
import sys

# Ray enables authentication by itself only in the process that starts a cluster, which is another one (`cluster_process`).
# It reads this variable when it is imported; the token comes later (`ray_access`).
if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
    os.environ["RAY_AUTH_MODE"] = "token"
