#!/usr/bin/env bash
# Train and evaluate with each of several seeds, and end with one table. scripts/launch.sh, and so every recipe, comes
# here where SEEDS is set:
#
#   SEEDS="0 1 2" bash scripts/run_opsd_1b.sh
#   EVALUATION="eval/run_eval.sh --dataset aime24 --val_n 4" SEEDS="0 1 2" bash scripts/run_opsd_1b.sh
#   SEEDS="0 1 2" sbatch --array 0-2 --gpus 4 --wrap "bash scripts/run_opsd_1b.sh"     # a job for each seed
#
# Seed S has OUTPUT_DIR/seed_S to itself: its training, and its scores in results/. The base model is evaluated once,
# with the first seed. The table is OUTPUT_DIR/results/seeds.md (eval/aggregate.py). The same command goes on where a
# killed one stopped, and does nothing twice: trainings resume from their last complete checkpoint, evaluations keep
# their samples.
#
# EVALUATION is a script of eval/ with further arguments. DRY_RUN=1 checks the trainings and prints the evaluations.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/activate.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # of this folder also where .venv is another clone's

seeds=($SEEDS)
evaluation=(${EVALUATION:-eval/run_eval.sh}) # words
folder='' model='' before=''
for word in "$@"; do # the last one wins, as in the programs
    case $before in --output_dir) folder=$word ;; --model_name_or_path) model=$word ;; esac
    case $word in --output_dir=*) folder=${word#*=} ;; --model_name_or_path=*) model=${word#*=} ;; esac
    before=$word
done
fail() { echo "seeds.sh: $*" >&2 && exit 1; }
[ -n "$folder" ] || fail "SEEDS needs --output_dir, the folder of all seeds"
[ -n "$model" ] || fail "SEEDS needs --model_name_or_path, which the evaluation starts from"
[ -f "${evaluation[0]}" ] || fail "EVALUATION ${evaluation[0]}: no such script"
for seed in "${seeds[@]}"; do
    [[ $seed =~ ^[0-9]+$ ]] || fail "SEEDS $SEEDS: $seed is no whole number"
done
[ "$(printf '%s\n' "${seeds[@]}" | sort -u | wc -l)" = ${#seeds[@]} ] || fail "SEEDS $SEEDS: a seed comes twice"
own=("${seeds[@]}")
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    own=("${seeds[SLURM_ARRAY_TASK_ID]:?SEEDS has no seed for this task of the array: say sbatch --array 0-N}")
fi
unset SEEDS SEED DATASET CHECKPOINTS # SEED and DATASET would be those of the evaluation, which has its own
result=results/$(basename "${evaluation[0]}" .sh).json

for seed in "${own[@]}"; do
    run=$folder/seed_$seed
    command=(bash scripts/launch.sh "$@" --seed "$seed" --output_dir "$run")
    if compgen -G "$run/checkpoint-*/checkpoint_files.json" >/dev/null; then # written last: a complete one
        command+=(--resume_from_checkpoint true)                             # a finished run says so and ends
    elif compgen -G "$run/checkpoint-*" >/dev/null; then                     # torn before the first was complete
        command+=(--overwrite_output_dir)
    fi
    echo "== seed $seed: training =="
    "${command[@]}"
    command=(bash "${evaluation[@]}" --output_file "$run/$result")
    [ "$seed" = "${seeds[0]}" ] || command+=(--skip_base)
    echo "== seed $seed: evaluation =="
    if [ "${DRY_RUN:-0}" = 1 ]; then
        printf '%q ' env OUTPUT_DIR="$run" MODEL="$model" "${command[@]}" && echo
    else
        OUTPUT_DIR=$run MODEL=$model "${command[@]}"
    fi
done
[ "${DRY_RUN:-0}" != 1 ] || exit 0

files=()
for seed in "${seeds[@]}"; do
    file=$folder/seed_$seed/$result
    grep -qs '"complete": true' "$file" || { echo "no table yet: $file is not complete" && exit 0; }
    files+=("$file")
done
echo "== seeds ${seeds[*]} =="
exec python eval/aggregate.py "${files[@]}" --output_file "$folder/results/seeds.json"
