"""The policy loss on plain tensors: FIPO, DAPO and GRPO. Needs torch and nothing else.

Reading order: `config` (the settings), `loss` (the eight steps), `future_kl` (the scan), `scan_layout` (its index tables),
`drop_rule`, `correction`, `metrics` and `statistics` (what a step reports). `padded` is the same loss for [B, L] batches;
`kernels/` the same arithmetic in Triton. `advantages` is host arithmetic on numpy for the driver.
"""
