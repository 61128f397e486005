"""The output layer: log-probs and entropy of response tokens without materializing full logits.

Runs in a trainer rank. `head` is the autograd function and its collectives. `slab` has the types it shares
with the per-slab passes. The passes are in `torch_passes` (plain torch) and
`model/logprob_head/triton_passes.py`.
"""
