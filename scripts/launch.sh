# Sourced by every launcher in this folder: torchrun told to hand signals on, and the tracker file of a run read with care.
# shellcheck shell=bash

# Use the virtual environment that the Makefile made, unless the user has activated another one.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/torchrun ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

# signals_to_hand_on: what torchrun passes to its ranks, which save and end in order on TERM, INT, HUP, USR1 and USR2. It needs to be
# told of USR1 and USR2, which would end it and leave its ranks behind. What this shell was started to ignore (nohup: HUP) is left
# out: a handler of torchrun's would undo that.
signals_to_hand_on() {
    local name ignored names=()
    for name in TERM INT HUP QUIT USR1 USR2; do
        ignored=$(trap -p "$name")
        [ -n "$ignored" ] || names+=("SIG$name")
    done
    local IFS=,
    echo "${names[*]}"
}
# torchrun reads its options from PET_ variables. Not a command-line option, so that one given by the user wins.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-$(signals_to_hand_on)}
# How long torchrun lets its ranks save after a signal before it kills them (its default is 30 s). A rank that hangs ends itself after
# --distributed-timeout-minutes (10); this is for one that cannot even do that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}

# A store of its own for every start of the ranks. torchrun's default is one for all, where ranks that --max-restarts starts again find
# the addresses of those that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

# newest_checkpoint FOLDER: what its tracker file names: an iteration in decimal, or "release" (converted, not yet trained). Nothing
# without a tracker file, and "damaged" for one that holds anything else: its text is never handed to the shell's arithmetic, which
# would run commands in it.
newest_checkpoint() {
    local tracker=$1/latest_checkpointed_iteration.txt text
    [ -e "$tracker" ] || return 0
    text=$({ head -c 64 "$tracker" | tr -d '\0'; } 2>/dev/null) || true
    if [[ $text =~ ^[[:space:]]*([0-9]{1,18})[[:space:]]*$ ]]; then
        echo $((10#${BASH_REMATCH[1]}))
    elif [[ $text =~ ^[[:space:]]*release[[:space:]]*$ ]]; then
        echo release
    else
        echo damaged
    fi
}

# supervise COMMAND...: run it in a process group of its own and pass every signal on, so that each reaches it exactly once, whether it
# was sent to this script, to its group or by the terminal. Returns its exit status.
supervise() {
    local pid name status=0
    set -m
    "$@" </dev/null &
    pid=$!
    set +m
    for name in TERM INT HUP QUIT USR1 USR2; do
        # shellcheck disable=SC2064  # the numbers of now
        trap "kill -s $name $pid 2>/dev/null || true" "$name"
    done
    while :; do # a signal that is passed on ends `wait`
        status=0
        wait "$pid" || status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    wait "$pid" || status=$?
    trap - TERM INT HUP QUIT USR1 USR2
    return "$status"
}
