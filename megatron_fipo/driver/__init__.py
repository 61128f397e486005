"""The driver: the process of `megatron-fipo train`. Importing it loads neither torch nor Megatron-Core."""

import os
import secrets
import sys
from pathlib import Path

# Ray enables authentication by itself only in the process that starts a cluster, which is another one (`cluster_process`).
# It reads these variables when it is imported. A cluster without authentication ignores the token.
if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
    os.environ["RAY_AUTH_MODE"] = "token"
    if (
        not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        and not Path("~/.ray/auth_token").expanduser().exists()
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
