#!/bin/bash
# Trains on this machine, on a separate Ray with a dashboard and token authentication:
#
#     launch/local.sh RECIPE [a.b=c …] --output DIR
#
# The script takes the arguments of `orchestrator train` and ends with its exit code (75: run it again and it
# resumes). Ctrl-C or SIGTERM lets the run write a checkpoint first. Without this script `orchestrator train`
# starts a Ray too, but one without a dashboard.
#
# Optional variables: RAY_PORT, DASHBOARD_PORT, RAY_START_OPTIONS (e.g. "--num-gpus=2"), START_TIMEOUT_S,
# PYTHON.
# shellcheck disable=SC2317 # functions called by trap

set -euo pipefail

RAY_PORT=${RAY_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
START_TIMEOUT_S=${START_TIMEOUT_S:-120}
PYTHON=${PYTHON:-python}

if (($# == 0)); then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 64
fi

state=$(mktemp -d /tmp/ray-XXXXXX) # mode 0700; a short name, because paths of sockets are limited
(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$state/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token RAY_TMPDIR=$state RAY_worker_niceness=0
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}

ray="" run=""
finish() {
    # `ray stop` would end every Ray of this user; the Ray of this script ends with its `ray start --block`
    if [[ -n $ray ]] && kill -TERM "$ray" 2>/dev/null; then
        for _ in {1..200}; do
            kill -0 "$ray" 2>/dev/null || break
            sleep 0.1
        done
        pkill -KILL -s "$ray" || true # the rest of its session: a helper of the dashboard outlives it
    fi
    rm -rf "$state"
}
trap finish EXIT
trap 'if [[ -n $run ]]; then kill -TERM "$run" 2>/dev/null || true; else exit 75; fi' TERM INT

read -ra options <<<"${RAY_START_OPTIONS:-}"
# a separate session: Ctrl-C must reach the training, not Ray
setsid ray start --head --block --node-ip-address=127.0.0.1 --port="$RAY_PORT" --dashboard-host=127.0.0.1 \
    --dashboard-port="$DASHBOARD_PORT" "${options[@]}" >"$state/ray.log" 2>&1 </dev/null &
ray=$!
deadline=$((SECONDS + START_TIMEOUT_S))
until ray health-check --address "127.0.0.1:$RAY_PORT" >/dev/null 2>&1; do
    if ! kill -0 "$ray" 2>/dev/null || ((SECONDS > deadline)); then
        tail -n 20 "$state/ray.log" >&2
        echo "local.sh: Ray did not start within $START_TIMEOUT_S s (RAY_PORT=$RAY_PORT taken?)" >&2
        exit 69
    fi
    sleep 0.5
done
echo "dashboard  http://127.0.0.1:$DASHBOARD_PORT  token in $state/token"

setsid env RAY_ADDRESS="127.0.0.1:$RAY_PORT" "$PYTHON" -m orchestrator train "$@" &
run=$!
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends `wait`, not the run
    code=0
    wait "$run" || code=$?
done
exit "$code"
