#!/bin/bash
# Runs a Ray cluster of machines that are reached by ssh. HOSTFILE has one machine a line, the head first:
# `NAME [ADDRESS [OPTION…]]`. ADDRESS is the address for the other machines (default NAME), and OPTIONs go to
# `ray start`, e.g. `node7 10.0.0.7 --num-gpus=4`.
#
#     launch/ray_cluster.sh up HOSTFILE          starts the cluster; returns when every node has joined
#     launch/ray_cluster.sh submit HOSTFILE RECIPE [a.b=c …] --output DIR
#                                                runs `ray job submit` on the head; DIR is on shared storage
#     launch/ray_cluster.sh status HOSTFILE      prints the nodes and their resources
#     launch/ray_cluster.sh down HOSTFILE        ends what `up` started, and nothing else
#
# The token is made on the head and copied to the others through ssh, mode 0600; it is never on a command
# line. The dashboard listens on the head's loopback: `ssh -L 8265:127.0.0.1:8265 HEAD`. Ray gives up a node
# that stops answering after three checks of 5 s, 2 s apart: 21 s at most. Optional variables:
#   SSH          command that runs a command on a machine (`$SSH NAME COMMAND`);
#                default ssh -o BatchMode=yes -o ConnectTimeout=10
#   ACTIVATE     command to run there first, e.g. ". /shared/venv/bin/activate"; default nothing: ray and python
#                must be on the PATH
#   WORKDIR      working folder of the job; default ~ of the head
#   CLUSTER_DIR  folder of token, logs and process ids on each machine; default ~/.orchestrator-cluster
#   RAY_PORT, DASHBOARD_PORT, START_TIMEOUT_S
# shellcheck disable=SC2016,SC2029,SC2086 # the other machine expands them; SSH is several words

set -euo pipefail

SSH=${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10}
ACTIVATE=${ACTIVATE:-:}
CLUSTER_DIR=${CLUSTER_DIR:-'$HOME/.orchestrator-cluster'}
RAY_PORT=${RAY_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
START_TIMEOUT_S=${START_TIMEOUT_S:-300}

fail() {
    echo "ray_cluster.sh: $2" >&2
    exit "$1"
}

quoted() { # one word in any login shell of the other machine
    printf " '%s'" "${@//\'/\'\\\'\'}"
}

# on NAME SCRIPT [ARGUMENT…]: runs a script on a machine, after the settings below
on() {
    local host=$1 script=$2
    shift 2
    $SSH "$host" "bash -c$(quoted "$settings"$'\n'"$script" cluster "$@")"
}

settings='set -euo pipefail
dir='"$CLUSTER_DIR"'
umask 077
mkdir -p "$dir"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token RAY_USAGE_STATS_ENABLED=0
export RAY_TMPDIR=/tmp/ray-$(id -un)-'"$RAY_PORT"' # short: it holds sockets; one name for all machines
mkdir -p "$RAY_TMPDIR"
export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3
export RAY_worker_niceness=0  # by default 15: beside other work they would starve
'"$ACTIVATE"

# Starts `ray start --block` in a separate session, whose id `down` ends. Arguments: name, options of ray start.
start='name=$1; shift
setsid nohup ray start --block "$@" >"$dir/$name.log" 2>&1 </dev/null &
echo $! >"$dir/$name.pid"'

runs='kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null'

# Arguments: name. SIGTERM lets `ray start --block` end its daemons; after 20 s its session is killed.
stop='name=$1; pid=$(cat "$dir/$name.pid" 2>/dev/null || true)
if [ -n "$pid" ]; then
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 200); do pgrep -s "$pid" >/dev/null || break; sleep 0.1; done
    pkill -KILL -s "$pid" || true
fi
rm -f "$dir/$name.pid"'

# Arguments: address of the head, number of nodes, deadline in seconds. Returns when so many nodes are alive.
joined='python - "$@" <<"PYTHON"
import sys, time
import ray

address, wanted, deadline = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
ray.init(address=address, logging_level="ERROR", log_to_driver=False)
while (alive := [n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]]) and len(alive) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"only {len(alive)} of {wanted} nodes joined: {sorted(alive)}")
    time.sleep(1)
print(f"{len(alive)} nodes: {sorted(alive)}")
PYTHON'

names=() addresses=() options=()
read_hosts() {
    [[ -r ${1:-} ]] || fail 66 "no host file ${1:-}; usage: up|submit|status|down HOSTFILE"
    local name address rest
    while read -r name address rest || [[ -n $name ]]; do
        if [[ -z $name || $name == \#* ]]; then continue; fi
        names+=("$name") addresses+=("${address:-$name}") options+=("$rest")
    done <"$1"
    ((${#names[@]} > 0)) || fail 65 "$1 names no machine"
    head=${names[0]} head_address=${addresses[0]}:$RAY_PORT
}

up() {
    local deadline=$((SECONDS + START_TIMEOUT_S)) name i extra
    for name in "${names[@]}"; do
        on "$name" "$runs" "$name" 2>/dev/null && fail 73 "$name is up already (down first?)"
    done
    trap 'echo "ray_cluster.sh: start failed, taking down what was started" >&2; down' EXIT
    # an existing token is kept, so that `up` after a failure does not invalidate copies of it
    on "$head" '[ -s "$dir/token" ] || head -c 32 /dev/urandom | od -An -v -tx1 | tr -d " \n" >"$dir/token"; chmod 600 "$dir/token"'
    read -ra extra <<<"${options[0]}"
    on "$head" "$start" "$head" --head --node-ip-address="${addresses[0]}" --port="$RAY_PORT" \
        --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT" "${extra[@]}"
    until on "$head" 'ray health-check --address "$1"' "$head_address" >/dev/null 2>&1; do
        if ((SECONDS > deadline)) || ! on "$head" "$runs" "$head"; then
            on "$head" 'tail -n 20 "$dir/$1.log"' "$head" >&2
            fail 69 "the head did not start on $head within $START_TIMEOUT_S s"
        fi
        sleep 1
    done
    for ((i = 1; i < ${#names[@]}; i++)); do
        on "$head" 'cat "$dir/token"' \
            | on "${names[i]}" 'cat >"$dir/token.$$" && mv "$dir/token.$$" "$dir/token"'
        read -ra extra <<<"${options[i]}"
        on "${names[i]}" "$start" "${names[i]}" --address="$head_address" \
            --node-ip-address="${addresses[i]}" "${extra[@]}"
    done
    on "$head" "$joined" "$head_address" "${#names[@]}" $((deadline - SECONDS)) \
        || fail 69 "not every machine joined within $START_TIMEOUT_S s"
    trap - EXIT
}

submit() {
    # the job inherits the environment of the head's raylet: put secrets there (WANDB_API_KEY before `up`, or
    # ~/.netrc)
    on "$head" 'address=$1; shift; cd "${1/#\~/$HOME}"; shift
        ray job submit --address "$address" -- python -m orchestrator train "$@"' \
        "http://127.0.0.1:$DASHBOARD_PORT" "${WORKDIR:-~}" "$@"
}

down() {
    local i failed=0
    for ((i = ${#names[@]} - 1; i >= 0; i--)); do # the head last, so that its nodes can deregister
        on "${names[i]}" "$stop" "${names[i]}" || { echo "ray_cluster.sh: ${names[i]} was not reached" >&2; failed=69; }
    done
    for ((i = 0; i < ${#names[@]}; i++)); do # after all have ended, because machines may share their /tmp
        on "${names[i]}" 'rm -rf "$RAY_TMPDIR"' || failed=69
    done
    return "$failed"
}

command=${1:-}
shift || true
case $command in
    up | submit | status | down) read_hosts "${1:-}" && shift ;;
    *) sed -n '2,/^# shellcheck/s/^# \{0,1\}//p' "$0" >&2 && exit 64 ;;
esac
case $command in
    up) up ;;
    submit) submit "$@" ;;
    status) on "$head" 'ray status --address "$1"' "$head_address" ;;
    down) down ;;
esac
