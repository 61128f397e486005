"""What FutureKL is made of in a real run: train its iterations again, keep every token's numbers, analyse them.

Reading order: `__main__` (the command and all columns), `run` (the run on disk), `replay` (its mini-steps again, and the check
that they are the run's), `tokens` (the numbers of each token), then one file per part of the result: `spread`, `correlation`,
`noise`, `mismatch`; `analysis` calls them and `render` writes the Markdown. `samplers` computes log-probs under other
policies, `countdown` reads the attempts of that task.
"""
