#!/usr/bin/env bash
# Start a training program on NUM_PROCESSES GPUs of this machine (without it those that CUDA_VISIBLE_DEVICES names);
# every recipe ends here:
#
#   NUM_PROCESSES=4 bash scripts/launch.sh opsd_train.py [arguments]
#
# ACCELERATE_CONFIG names another launcher than accelerate.yaml. DRY_RUN=1 prints the command, checks all arguments
# and local data with the program's own parsers, shows what the run would do, writes all settings to dry_run.json in
# the output folder, and exits; it loads no model.
#
# SEEDS="0 1 2" trains and evaluates with each of these seeds: see scripts/seeds.sh.
#
# Several machines: NUM_MACHINES, MAIN_PROCESS_IP and MAIN_PROCESS_PORT, with NUM_PROCESSES on all machines together.
# Each machine runs the same command with a MACHINE_RANK of its own, from 0 on. scripts/train_multi_node.sh sets them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/activate.sh
[ -z "${SEEDS:-}" ] || exec bash scripts/seeds.sh "$@"

program=${1:?name the program: opsd_train.py, sft_train.py or grpo_train.py}
shift
config=${ACCELERATE_CONFIG:-accelerate.yaml}
NUM_PROCESSES=$(bash scripts/num_processes.sh)
for file in "$program" "$config"; do
    [ -f "$file" ] || { echo "launch.sh: $file: no such file" >&2 && exit 1; }
done

command=(accelerate launch --config_file "$config" --num_processes "$NUM_PROCESSES")
if [ -n "${NUM_MACHINES:-}" ]; then # on the command line, since accelerate reads the rendezvous from nowhere else
    command+=(
        --num_machines "$NUM_MACHINES"
        --machine_rank "${MACHINE_RANK:-${SLURM_NODEID:-0}}"
        --rdzv_backend c10d
        --main_process_ip "${MAIN_PROCESS_IP:?name the machine that the others find each other through}"
        --main_process_port "${MAIN_PROCESS_PORT:?choose a port that is free there}"
    )
fi
command+=("$program" "$@")
printf '%q ' "${command[@]}" && echo
[ "${DRY_RUN:-0}" != 1 ] || exec python "$program" "$@" --dry_run "$NUM_PROCESSES"
exec "${command[@]}"
