"""Slurm jobs: typed settings, the batch script that they become, and its submission. Runs where `sbatch` does."""
