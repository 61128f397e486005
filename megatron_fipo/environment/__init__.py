"""What this machine has: cores, GPUs, installed packages."""
