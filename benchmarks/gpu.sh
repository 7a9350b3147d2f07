#!/usr/bin/env bash
# The whole GPU run, at the shapes of Qwen2-VL-2B with random weights: one command, at most 14 minutes on an 80 GB GPU,
# no network. Padding is left out, which needs no GPU. From the root of the repository: bash benchmarks/gpu.sh [FOLDER]
# FOLDER: of the results, by default benchmarks/results; they are written as they come, also of a part that is stopped.
# PYTHON chooses the interpreter, SECONDS_IN_ALL the time after which what is left is not begun, and PARTS, such as
# "utilisation loader", which lines at the end of this file are run, by a word in them.
set -u
output=${1:-benchmarks/results}
python=${PYTHON:-python}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-840}))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
failed=0

# The most important first: each part writes its own files, and one that fails or runs out of time leaves the others.
wanted() { # arguments
  local word
  [[ -z ${PARTS:-} ]] && return 0
  for word in $PARTS; do
    [[ " $* " == *" $word "* ]] && return 0
  done
  return 1
}

part() { # seconds, arguments
  local left=$((deadline - SECONDS)) limit=$1
  shift
  wanted "$@" || return 0
  if ((left < 20)); then
    echo "no time left for: $*" >&2
    failed=1
    return
  fi
  echo "== $* ($left s left)" >&2
  timeout "$((limit < left ? limit : left))" "$python" benchmarks/steps.py --device "${DEVICE:-cuda}" --output "$output" "$@" \
    ${EXTRA:-} || { echo "failed or stopped: $*" >&2; failed=1; }
}

part 210 --parts utilisation
part 300 --parts baseline
part 180 --parts cache memory
part 150 --parts loader
exit $failed
