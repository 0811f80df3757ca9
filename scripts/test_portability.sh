#!/usr/bin/env bash
# Run the tests under several arithmetics of the processor, with one and two threads, on three tiny models. A test
# that fails on some machines depends on last digits, on what a model samples, or on how well it is trained.
#
#   bash scripts/test_portability.sh [--quick] [--all] [--cross] [arguments of pytest, such as test files]
#
#   default   the tests that compute something, without vLLM and without processes of their own: each arithmetic with
#             one and with two threads, the models in turn
#   --quick   only one arithmetic, which is not the machine's own, with one thread on the tests' own model: losses,
#             trainer and teacher, without the tests of learning and resuming, which take longest (for CI)
#   --all     all tests but the slow ones
#   --cross   each arithmetic and number of threads on each of the three models
#
# TEST_SEED=N gives rollouts and adapters another seed. Models 1 and 2 are built once, into the quickstart's cache.
set -uo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh cpu || exit 1
source .venv/bin/activate
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TRL_EXPERIMENTAL_SILENCE=1 PYTHONPATH=$PWD

quick= all= cross=
while [[ ${1:-} == --quick || ${1:-} == --all || ${1:-} == --cross ]]; do
    declare "${1#--}=yes"
    shift
done
selection=(-m "not slow")
if [ -z "$all" ]; then
    files=()
    [ $# -gt 0 ] || mapfile -t files < <(grep -lE "make_trainer|assert_close|approx" tests/test_*.py)
    selection=(-m "not slow and not vllm and not multiprocess" "${files[@]}")
fi

arithmetics=("" "ATEN_CPU_CAPABILITY=default" "MKL_CBWR=COMPATIBLE" "ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE")
own=$(python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')
[ "$own" != AVX512 ] || arithmetics+=("ATEN_CPU_CAPABILITY=avx2")
all_threads=(1 2)
models=("$PWD/tests/tiny_model")
if [ -n "$quick" ]; then
    arithmetics=("ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE") all_threads=(1) cross=yes
    selection=(-m "not slow and not vllm and not multiprocess" -k "not learn and not resum and not triton"
        tests/test_{losses_*,opsd_trainer,packing,teacher*,variants,model_families}.py)
else
    for seed in 1 2; do
        log=$(OMP_NUM_THREADS=1 python quickstart/base_model.py --output_dir outputs/quickstart/base --seed $seed 2>&1)
        folder=$(sed -n 's/^the base model is in \([^ ]*\).*/\1/p' <<<"$log")
        [ -d "$folder" ] || { echo "test_portability.sh: the model of seed $seed was not built: $log" >&2 && exit 1; }
        models+=("$PWD/$folder")
    done
fi

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
table="| arithmetic | threads | model | passed | failed | minutes |\n|---|--:|--:|--:|--:|--:|\n"
failures= run=0
for arithmetic in "${arithmetics[@]}"; do
    for threads in "${all_threads[@]}"; do
        for model in "${!models[@]}"; do
            [ -n "$cross" ] || [ "$model" = $((run % ${#models[@]})) ] || continue
            name="${arithmetic:-own ($own)} | $threads | $model"
            echo "== $name"
            start=$SECONDS
            # shellcheck disable=SC2086  # the arithmetic is none, one or two assignments
            env $arithmetic OMP_NUM_THREADS="$threads" TINY_MODEL="${models[$model]}" \
                python -m pytest -q -n $((2 / threads)) --dist loadfile --durations 0 --durations-min 60 \
                "${selection[@]}" "$@" >"$results/log" 2>&1
            status=$?
            summary=$(grep -E "^[0-9]+ (passed|failed|error|skipped)|no tests ran" "$results/log" | tail -1)
            count() { grep -oE "[0-9]+ ($1)" <<<"$summary" | awk '{ sum += $1 } END { print sum + 0 }'; }
            minutes=$(awk "BEGIN { printf \"%.1f\", ($SECONDS - $start) / 60 }")
            table+="| $name | $(count passed) | $(count "failed|error") | $minutes |\n"
            echo "${summary:-pytest ended with status $status}"
            if [ "$status" != 0 ]; then
                failures+="$name\n$(grep -E "^(FAILED|ERROR)" "$results/log")\n"
                [ -n "$summary" ] || tail -20 "$results/log"
            fi
        done
        run=$((run + 1))
    done
done
printf "\n%b" "$table"
[ -z "$failures" ] || { printf "\n%b" "$failures" && exit 1; }
