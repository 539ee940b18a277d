#!/usr/bin/env bash
# Everything that needs a GPU, in one command, within the minutes given:
#
#   bench/gpu.sh OUT MINUTES [--dry-run]
#
# Needs this checkout and a Python (PYTHON, by default python3) with torch, triton and pytest. It
# installs nothing and writes nothing but into the folder OUT, so the checkout may be read-only.
# Steps come in the order of their worth; each has its share of the time and leaves its file at once:
#
#   environment.txt  GPU, driver, versions
#   hopper.json      the warp-specialised attention of sm_90 beside the one of all devices and cuDNN:
#                    a table that turns it on where it is the fastest; hopper.txt has the times
#   check.txt        every op against its reference on the device
#   tests.txt        the tests that launch kernels
#   races.txt        the tests that only a GPU can run, and compute-sanitizer where there is one
#   features.json    which features of attention which library has, by trying them; features.md has
#                    the tables
#   benchmarks.json  every op beside its contenders; benchmarks.txt has the tables, plots.tar.gz the
#                    pictures
#   predicted.json   what is predicted of the kernels from their code beside what benchmarks.json
#                    measured; predicted.txt has the table
#   tuned.json       the fastest block sizes found in what is left of the time
#   summary.txt      which steps passed, and what the tuner found
#
# A step that fails does not stop the next; the exit code is 1 if any failed. --dry-run walks all
# steps on a CPU at tiny size, with the kernels in Triton's interpreter.
set -uo pipefail

usage() {
    echo "usage: bench/gpu.sh OUT MINUTES [--dry-run]" >&2
    exit 2
}

[[ $# -eq 2 || ($# -eq 3 && $3 == --dry-run) ]] || usage
[[ $2 =~ ^[1-9][0-9]*$ ]] || usage
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
TOTAL=$((60 * $2))
DRY_RUN=${3:-}
PYTHON=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# Compilers and tools write here, never into the checkout.
WORK=$(mktemp -d "$OUT/.work.XXXXXX") || exit 2
CHILD=
trap 'rm -rf "$WORK"' EXIT
trap 'kill $CHILD 2>/dev/null; wait; exit 143' TERM INT HUP
mkdir -p "$WORK"/{tmp,plots}
export PYTHON WORK TMPDIR=$WORK/tmp XDG_CACHE_HOME=$WORK/cache MPLCONFIGDIR=$WORK/matplotlib
export TRITON_HOME=$WORK TRITON_CACHE_DIR=$WORK/triton CUDA_CACHE_PATH=$WORK/cuda
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor HYPOTHESIS_STORAGE_DIRECTORY=$WORK/hypothesis
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
INTERPRET=()
if [[ $DRY_RUN ]]; then
    export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
    INTERPRET=(env TRITON_INTERPRET=1)
fi

SUMMARY=$OUT/summary.txt
rm -f "$OUT"/{environment,hopper,check,tests,races,features,benchmarks,predicted,summary}.txt
rm -f "$OUT"/{hopper,features,benchmarks,predicted,tuned}.json "$OUT"/features.md "$OUT"/plots.tar.gz
FAILED=0

note() { echo "$*" | tee -a "$SUMMARY"; }

left() { echo $((TOTAL - SECONDS)); }

percent() { echo $((TOTAL * $1 / 100)); }

# step NAME SECONDS FILE COMMAND...: the command's output goes to the file as it comes.
step() {
    local name=$1 limit=$2 file=$3 started=$SECONDS code
    shift 3
    ((limit <= $(left))) || limit=$(left)
    if ((limit < 5)); then
        note "$name: FAILED, no time left"
        FAILED=1
        return
    fi
    # Waited for in the background, so that a signal to this script ends the step at once.
    timeout --kill-after=10 "$limit" "$@" >>"$OUT/$file" 2>&1 &
    CHILD=$!
    wait $CHILD
    code=$?
    case $code in
    0) note "$name: passed in $((SECONDS - started)) s" ;;
    124 | 137) note "$name: FAILED, stopped after $((SECONDS - started)) s" ;;
    *) note "$name: FAILED with exit code $code after $((SECONDS - started)) s" ;;
    esac
    ((code == 0)) || FAILED=1
}

run_pytest() {
    local name=$1 limit=$2 file=$3
    shift 3
    step "$name" "$limit" "$file" ${INTERPRET[@]+"${INTERPRET[@]}"} "$PYTHON" -m pytest -q \
        -p no:cacheprovider -p no:benchmark --continue-on-collection-errors --durations=10 "$@"
}

has_module() { "$PYTHON" -c "import sys, importlib.util as u; sys.exit(not u.find_spec('$1'))"; }

describe() {
    nvidia-smi || rocm-smi || echo "no nvidia-smi and no rocm-smi"
    "$PYTHON" -m fastattn info || return
    "$PYTHON" -c 'from bench.environment import commit; print("commit      ", commit())' || return
    for name in pytest xdist pytest_benchmark hypothesis matplotlib rich liger_kernel quack; do
        has_module $name && echo "found        $name"
    done
    true
}

# Eight ops at a time: most of the time is the host's, which compiles.
check_all() {
    set -o pipefail
    "$PYTHON" -c 'import fastattn
from fastattn.ops.core.catalog import OPERATIONS
print("\n".join(OPERATIONS))' | xargs -P 8 -I{} sh -c '
        "$PYTHON" -m fastattn check --op {} >"$WORK/check.{}" 2>&1
        code=$?
        cat "$WORK/check.{}"
        exit $code'
}
export -f describe has_module check_all

if [[ -z $DRY_RUN ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
then
    note "no GPU that the torch of $PYTHON can use; --dry-run walks the steps without one"
    exit 2
fi

step environment "$(percent 10)" environment.txt bash -c describe

# First of all, for no table ships that turns it on, and nothing else says whether one should.
HOPPER=("$PYTHON" -m fastattn tune)
for kernel in forward keys_backward queries_backward; do
    HOPPER+=(--kernel "attention_hopper_$kernel")
done
LIMIT=$(percent 10)
if [[ $DRY_RUN ]]; then
    step hopper "$LIMIT" hopper.txt "${HOPPER[@]}" --dry-run
else
    step hopper "$LIMIT" hopper.txt "${HOPPER[@]}" --out "$OUT/hopper.json" \
        --minutes "$("$PYTHON" -c "print(max(0.2, ($LIMIT - 20) / 60))")"
fi

if [[ $DRY_RUN ]]; then
    step check "$(percent 15)" check.txt "$PYTHON" -m fastattn check --quick --op dropout
    run_pytest tests "$(percent 25)" tests.txt tests/ops/test_every_op.py -m kernels \
        -k 'accuracy_rule and smallest and float32'
    run_pytest races "$(percent 20)" races.txt tests/gpu -m 'kernels or gpu' -k 'dropout or seen'
else
    WORKERS=()
    has_module xdist && WORKERS=(-n 8)
    step check "$(percent 15)" check.txt bash -c check_all
    run_pytest tests "$(percent 25)" tests.txt ${WORKERS[@]+"${WORKERS[@]}"} tests \
        -m 'kernels and not gpu'
    run_pytest races "$(percent 20)" races.txt tests -m gpu
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            step "compute-sanitizer $tool" "$(percent 4)" races.txt \
                env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
                "$PYTHON" -m pytest -q -p no:cacheprovider -p no:benchmark tests/ops/test_every_op.py -m kernels \
                -k 'accuracy_rule and bfloat16 and (smallest or several or wide)'
        done
    else
        note "compute-sanitizer: not found"
    fi
fi

FEATURES=("$PYTHON" -m bench.features --out "$OUT/features.json" --table "$OUT/features.md")
LIMIT=$(percent 10)
if [[ $DRY_RUN ]]; then
    step features $LIMIT features.txt "${FEATURES[@]}" --device cpu --contender 'SDPA math' \
        --feature plain
else
    step features $LIMIT features.txt "${FEATURES[@]}" \
        --minutes "$("$PYTHON" -c "print(max(0.2, ($LIMIT - 20) / 60))")"
fi
rm -f "$OUT"/features.json.partial

# All that is left, but for the last case's end, the pictures, the predictions and the tuner.
BENCH=("$PYTHON" -m bench)
LIMIT=$(($(left) - $(percent 15)))
if [[ $DRY_RUN ]]; then
    step benchmarks $LIMIT benchmarks.txt "${BENCH[@]}" --quick --op dropout --no-plots \
        --contender fastattn torch --device cpu --out "$OUT/benchmarks.json"
else
    step benchmarks $LIMIT benchmarks.txt "${BENCH[@]}" --no-plots --out "$OUT/benchmarks.json" \
        --minutes "$("$PYTHON" -c "print(max(0.2, ($LIMIT - 60) / 60))")"
fi
rm -f "$OUT"/benchmarks.json.partial
if [[ -f $OUT/benchmarks.json ]] && has_module matplotlib; then
    step pictures 60 benchmarks.txt "${BENCH[@]}" --draw "$OUT/benchmarks.json" --plots "$WORK/plots"
    tar -C "$WORK" -czf "$OUT/plots.tar.gz" plots
fi

PREDICT=("$PYTHON" -m bench.compiled.cost "$OUT/benchmarks.json" --out "$OUT/predicted.json")
# A CPU is no GPU that the model knows; what was measured on it is set beside an H100's prediction.
[[ -z $DRY_RUN ]] || PREDICT+=(--target sm_90)
step predicted "$(percent 10)" predicted.txt "${PREDICT[@]}"

if [[ $DRY_RUN ]]; then
    step tuner "$(left)" summary.txt "$PYTHON" -m fastattn tune --dry-run --kernel matmul
else
    step tuner "$(left)" summary.txt "$PYTHON" -m fastattn tune --out "$OUT/tuned.json" \
        --minutes "$("$PYTHON" -c "print(max(0.2, ($(left) - 30) / 60))")"
fi
exit $FAILED
