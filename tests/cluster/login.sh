#!/usr/bin/env bash
# Process 1 of the login node: a bridge that connects the nodes, and slurmctld.
# It ends, and the kernel with it everything in its namespaces, when its standard input closes.
# Usage: login.sh FOLDER ADDRESS/PREFIX
set -euo pipefail
folder=$1 address=$2
hostname login
mount --bind "$folder/etc/hosts" /etc/hosts
mount --bind "$folder/etc/slurm" /etc/slurm
ip link set lo up
ip link add bridge type bridge
ip address add "$address" dev bridge
ip link set bridge up
slurmctld -D -c &>"$folder/log/slurmctld.out" &
read -r || true
