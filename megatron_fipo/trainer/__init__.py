"""The training loop and the ranks behind it. Importing the package installs the CPU platform, before anything imports Megatron-Core."""

import megatron_fipo.model  # noqa: F401
