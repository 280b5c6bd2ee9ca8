#!/bin/bash
# A zray cluster within one Slurm job: a node of the cluster on every node of the job, and a program on the first.
# Made by `zray-cluster template slurm`. Change what is between the lines, then: sbatch THIS-FILE
#
# -------------------------------------------------------------------------------------------------------------------
#SBATCH --job-name=zray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=01:00:00
# GPUs: uncomment, zray sees those that Slurm gives.
##SBATCH --gpus-per-node=4

# What makes `zray` and your program's packages known, e.g.: module load python; source ~/venv/bin/activate
ACTIVATE=${ACTIVATE:-true}
# The network that nodes use among themselves, e.g. ib0; empty: that of the way out.
INTERFACE=${INTERFACE:-}
# More of the head's options, e.g. "--storage redis://HOST:PORT/DB": zray.kv and detached actors are there for the next job.
HEAD_OPTIONS=${HEAD_OPTIONS:-}
# Your program; it calls zray.init(), which finds the cluster.
PROGRAM=${PROGRAM:-python my_program.py}
# -------------------------------------------------------------------------------------------------------------------
set -euo pipefail
eval "$ACTIVATE"

port=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node get ports of their own
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The key lies in a directory that all nodes see and nobody else can read; it goes when the job ends.
place=$(mktemp -d "$HOME/.zray-slurm-$SLURM_JOB_ID-XXXXXX")
cleanup() {
    kill "${steps[@]}" 2>/dev/null || true
    wait || true
    rm -rf "$place"
}
steps=()
trap cleanup EXIT
trap 'exit 143' TERM
zray key "$place/cluster.key"

# Runtime files are each node's own: never in a shared home.
export ZRAY_RUNTIME_DIR=/tmp/zray-$UID-$SLURM_JOB_ID
cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}

# On each node: the options that say where it listens.
export INTERFACE HEAD_OPTIONS
# shellcheck disable=SC2016
where='host=(); if [[ -n $INTERFACE ]]; then
    address=$(ip -4 -o addr show "$INTERFACE" | { read -r _ _ _ a _; echo "${a%/*}"; }); host=(--host "$address"); fi'

# --block: Slurm ends what a step leaves behind, so each step stays as long as its node.
srun --nodes=1 --ntasks=1 --nodelist="$head_node" --overlap bash -c "$where"'
    exec zray start --head "${host[@]}" --port "$1" --key "$2/cluster.key" --num-cpus "$3" $HEAD_OPTIONS --block --json \
        > "$2/head.json"' \
    - "$port" "$place" "$cpus" &
steps+=($!)

for _ in $(seq 600); do
    [[ -s $place/head.json ]] && break
    kill -0 "${steps[0]}" 2>/dev/null || { echo "the head did not start" >&2; exit 1; }
    sleep 0.2
done
address=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$place/head.json")

if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 \
        --exclude="$head_node" --overlap bash -c "$where"'
        exec zray start --address "$1" "${host[@]}" --key "$2/cluster.key" --num-cpus "$3" --block' \
        - "$address" "$place" "$cpus" &
    steps+=($!)
fi

# The program starts when all nodes are there; it could also begin at once and use them as they come.
srun --nodes=1 --ntasks=1 --nodelist="$head_node" --overlap bash -c '
    for _ in $(seq 300); do
        [[ $(zray status | grep -c ALIVE) -ge $1 ]] && break
        sleep 0.5
    done
    export ZRAY_ADDRESS=$2
    eval "$3"' - "$SLURM_JOB_NUM_NODES" "$address" "$PROGRAM"
