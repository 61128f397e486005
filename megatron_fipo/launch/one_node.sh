# The same in every script.
set -u
step=(srun --nodes=1 --ntasks=1 --cpu-bind=none)
if [[ -n $CONTAINER ]]; then
  step+=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD")
elif [[ -n $VENV ]]; then
  export PATH="$VENV/bin:$PATH"
fi
exec "${step[@]}" megatron-fipo convert "$@"
