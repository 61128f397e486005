"""The loss in Triton, and the choice between Triton and plain torch.

`choice` decides per call; `launch` has the two entry points (`triton_scan`, `triton_policy_loss`); `triton_scan` and
`triton_loss` are the kernels. Nothing outside this folder imports Triton for the loss. The kernels of the output layer
are in `model/logprob_head/triton_passes.py`.
"""

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPU that Triton supports (Ampere)."""
