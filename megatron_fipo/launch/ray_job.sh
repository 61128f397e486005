# Everything below is the same in every script. Its decisions are made by Python: megatron_fipo/node.
set -u

say() { echo "megatron-fipo: $1" >&2; }
fail() { say "$1"; exit "${2:-2}"; }
[[ $PREFLIGHT == @(true|false) ]] || fail "PREFLIGHT=$PREFLIGHT must be true or false"
[[ $RETRIES =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "RETRIES=$RETRIES must be a whole number"
[[ $START_TIMEOUT =~ ^[1-9][0-9]{0,8}$ ]] || fail "START_TIMEOUT=$START_TIMEOUT must be a whole number of seconds above 0"
[[ -n ${SLURM_JOB_ID-} ]] || fail "this is a batch script of Slurm: sbatch $0 $*"
(($#)) || fail "$COMMAND needs arguments: sbatch [OPTIONS] SCRIPT ARGUMENTS"

unset SLURM_UNBUFFEREDIO # with it, srun gives commands a terminal, and logs get cursor movements
mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST-}")
((${#nodes[@]})) || fail "scontrol finds no nodes in SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST-}"
first=${nodes[0]}

# One task on each node that a step names; steps run beside each other. A step survives the loss of a node.
step=(srun --overlap --no-kill --kill-on-bad-exit=0 --cpu-bind=none --ntasks-per-node=1)
container=()
if [[ -n $CONTAINER ]]; then
  container=(--container-image="$CONTAINER" --container-name="megatron-fipo-$SLURM_JOB_ID"
    --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD")
elif [[ -n $VENV ]]; then
  [[ $VENV != *:* ]] || fail "VENV=$VENV must not have a colon, which ends a folder in PATH"
  [[ -x $VENV/bin/python ]] || fail "VENV=$VENV is no virtual environment on $first; it must be on a file system that all nodes share"
  export PATH="$VENV/bin:$PATH"
fi
on_all=("${step[@]}" "${container[@]}" --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}")
on_first=("${step[@]}" "${container[@]}" --nodes=1 --ntasks=1 --nodelist="$first")
on_others=("${step[@]}" "${container[@]}" --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$first")

# Slurm's notice before the time limit. The driver saves the state and exits with 85.
stop='' driver=''
trap 'stop=1; [[ -z $driver ]] || kill -USR1 "$driver"' USR1
trap 'exit 143' TERM

# Checks the command, guards against a loop of restarts, makes the log folder and the token of Ray: prints fipo_... variables.
fipo_logs='' fipo_token='' fipo_finished='' fipo_requeue='' fipo_code='' fipo_exclude=''
prepared=$("${on_first[@]}" python -m megatron_fipo.node.prepare --retries "$RETRIES" --nodes "${#nodes[@]}" -- "$COMMAND" "$@")
code=$?
case $code in
  0) eval "$(grep -a '^fipo_[a-z_]*=' <<<"$prepared")" ;;
  2) exit 2 ;;
  *) fail "python -m megatron_fipo.node.prepare ended with $code on $first; is megatron-fipo installed in ${CONTAINER:-${VENV:-the environment of this job}}?" ;;
esac
[[ -z $fipo_finished ]] || exit 0
[[ -n $fipo_logs ]] || fail "python -m megatron_fipo.node.prepare printed nothing on $first; is its python that of megatron-fipo?"
[[ -d $fipo_logs ]] || fail "$first has no folder $fipo_logs outside the container; mount run_dir's folder under the same name (MOUNTS=...)"
logs=$fipo_logs
exec > >(trap '' USR1; exec tee -a "$logs/job.log") 2>&1 # a scheduler may send the notice to all processes
tee=$!

phase() {
  echo "$(date '+%F %T') $1"
  printf '%s\t%s\n' "$(date +%s)" "$1" >>"$logs/phases.tsv"
}

roles=()
end_ray() { # Each node copies Ray's logs, ends Ray and removes its files.
  ((${#roles[@]})) || return
  kill -USR2 "${roles[@]}" 2>/dev/null
  for _ in {1..120}; do
    kill -0 "${roles[@]}" 2>/dev/null || break
    sleep 0.5
  done
  kill -TERM "${roles[@]}" 2>/dev/null
  wait "${roles[@]}"
  roles=()
}
# shellcheck disable=SC2317 # called by the trap
leave() {
  trap '' USR1 TERM
  end_ray
  rm -f "$fipo_token"
  [[ -z $CONTAINER ]] || "${step[@]}" --nodes="${#nodes[@]}" enroot remove --force "pyxis_megatron-fipo-$SLURM_JOB_ID" &>/dev/null
  exec >&- 2>&-
  wait "$tee"
}
trap leave EXIT

finished() { # finished PID: the exit code of a step, also if signals interrupt the wait.
  local code
  while wait "$1"; code=$?; ((code > 128)) && kill -0 "$1" 2>/dev/null; do :; done
  wait "$1"
  code=$?
  ((code < 233 || code > 236)) || code=86 # Slurm's errors 1001 to 1004, a byte of them: srun did not reach a node
  return "$code"
}

# Ends the attempt with the exit code $1 of the command or of a phase before it; requeues the job if that makes sense.
conclude() {
  local code=$1 after
  end_ray
  phase "end with $code"
  after=$("${on_first[@]}" python -m megatron_fipo.node.after --logs "$logs" --retries "$RETRIES" --code "$code") ||
    fail "python -m megatron_fipo.node.after failed, so the job is not requeued"
  eval "$(grep -a '^fipo_[a-z_]*=' <<<"$after")"
  if [[ -n $fipo_requeue ]]; then
    phase "requeue${fipo_exclude:+ without $fipo_exclude}"
    requeue
  fi
  exit "$fipo_code"
}
requeue() {
  local excluded
  trap '' TERM # which the requeue sends
  excluded=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2)
  [[ $excluded != "(null)" ]] || excluded=
  scontrol requeue "$SLURM_JOB_ID" || fail "scontrol requeue failed; submit the job again to resume"
  [[ -z $fipo_exclude ]] || for _ in {1..20}; do
    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$fipo_exclude${excluded:+,$excluded}" 2>/dev/null && break
    sleep 0.5
  done
}

if [[ $PREFLIGHT == true ]]; then
  phase "preflight of ${#nodes[@]} nodes"
  "${on_all[@]}" megatron-fipo preflight --run-dir "$logs" --bad-nodes "$logs/bad-nodes" --json "$logs/preflight.json" >"$logs/preflight.log" 2>&1 &
  if ! finished $!; then
    tail -n 20 "$logs/preflight.log"
    bad=$(grep -sc '' "$logs/bad-nodes") # empty if the preflight did not start
    conclude $((bad > 0 && bad < ${#nodes[@]} ? 86 : 2)) # a fault of all nodes is not theirs
  fi
fi

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$fipo_token MEGATRON_FIPO_LOG_DIR=$logs/ray
ray_node=(python -m megatron_fipo.node.ray_node --logs "$logs" ${INTERFACE:+"--interface=$INTERFACE"})
phase "Ray on the first node, $first"
second=${nodes[1]-}
peer=${second:+$(scontrol show node --oneliner "$second" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)}
"${on_first[@]}" "${ray_node[@]}" head ${peer:+"--peer=$peer"} >"$logs/first-node.log" 2>&1 &
roles=($!)
deadline=$((SECONDS + START_TIMEOUT))
until [[ -s $logs/ray_address ]]; do
  if ((SECONDS > deadline)); then
    say "Ray did not start on $first within $START_TIMEOUT s; the last line of its log: $(tail -n 1 "$logs/nodes/$first.log")"
    conclude 86
  elif ! kill -0 "${roles[0]}" 2>/dev/null; then
    wait "${roles[0]}"
    code=$?
    say "Ray did not start: $(grep '^node ' "$logs/first-node.log" || tail -n 1 "$logs/first-node.log")"
    conclude $((code == 2 ? 2 : 86))
  fi
  sleep 0.5
done
address=$(<"$logs/ray_address")

phase "Ray on all ${#nodes[@]} nodes"
if ((${#nodes[@]} > 1)); then
  "${on_others[@]}" "${ray_node[@]}" worker --address="$address" >"$logs/other-nodes.log" 2>&1 &
  roles+=($!)
fi
joined=(python -m megatron_fipo.node.joined --logs "$logs" --address "$address" --timeout "$START_TIMEOUT")
"${on_first[@]}" "${joined[@]}" "${nodes[@]}" >"$logs/joined.log" 2>&1 &
finished $! || { code=$?; tail -n 3 "$logs/joined.log"; conclude $((code == 2 ? 2 : 86)); }

[[ -z $stop ]] || conclude 85
phase "$COMMAND: tail -f $logs/driver.log"
"${on_first[@]}" megatron-fipo "$COMMAND" "$@" "ray_address=$address" >"$logs/driver.log" 2>&1 &
driver=$!
finished "$driver"
code=$?
driver=
((code == 0)) || tail -n 20 "$logs/driver.log"
((code != 86)) || "${on_first[@]}" "${joined[@]}" --lost "${nodes[@]}" >>"$logs/joined.log" 2>&1
conclude "$code"
