"""Model families: Hugging Face configs as an `Architecture`, and the tables of their weights.

Data and pure functions without torch modules. Read by the driver (config checks, plan), by every trainer rank
(model building, checkpoints, weight sync) and by `megatron-fipo convert`.
"""
