#!/usr/bin/env bash
# Process 1 of a node: its own /tmp and /dev/shm, a network interface and slurmd. Bash remains process 1, since it reaps orphans.
# It waits for a line on its standard input, after which eth0 must exist, and ends when the input closes.
# Usage: node.sh FOLDER NAME ADDRESS/PREFIX
set -euo pipefail
folder=$1 name=$2 address=$3
read -r
hostname "$name"
mount --bind "$folder/nodes/$name/tmp" /tmp
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up
slurmd -D &>"$folder/log/slurmd.$name.out" &
read -r || true
