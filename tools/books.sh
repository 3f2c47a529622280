#!/usr/bin/env bash
# A memory for books around SmolLM2-135M, trained and measured in one command, on a GPU or a CPU:
#
#   tools/books.sh TRAIN HELD_OUT OUT
#
# TRAIN and HELD_OUT are folders (or files, or globs) of long texts, OUT is where everything goes. After an interruption
# the same command goes on. Prints the table of docs/experiments.md: perplexity of the held-out books with their own
# memory, an empty one and another book's, and of the backbone alone (with a long context too: see EVAL_ARGS).
# Leaves OUT/metrics.jsonl (loss, tokens per second and memory use of every step), OUT/longmem.safetensors, and
# OUT/eval/perplexity.json and .png; also OUT/eval/states, what the backbone says about the held-out books, which the
# next evaluation would compute again (gigabytes; may be deleted).
#
#   SEGMENT      local context in tokens (default 256)
#   STEPS        optimiser steps (default 240 on a CPU: 250 thousand tokens, 2000 on a GPU: 16 million)
#   ROWS         books side by side (default 1024 tokens' worth on a CPU, 8192 on a GPU)
#   TRAIN_ARGS   more arguments for longmem train
#   EVAL_ARGS    more arguments for longmem eval, e.g. "--full-context 8192"
#   LONGMEM      the command (default .venv/bin/longmem, else longmem)
set -euo pipefail

if [[ $# -ne 3 ]]; then
  echo "usage: tools/books.sh TRAIN HELD_OUT OUT" >&2
  exit 2
fi
train=$1 held_out=$2 out=$3
longmem=${LONGMEM:-$([[ -x .venv/bin/longmem ]] && echo .venv/bin/longmem || echo longmem)}
segment=${SEGMENT:-256}
tokens=1024 steps=240 document=16384
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  tokens=8192 steps=2000 document=65536
fi
rows=${ROWS:-$((tokens / segment))}
read -ra train_args <<<"${TRAIN_ARGS:-}"
read -ra eval_args <<<"${EVAL_ARGS:-}"

"$longmem" train --data "$train" --out "$out" --segment "$segment" --rows "$rows" --steps "${STEPS:-$steps}" \
  --memory-tokens "$document" --document-tokens "$document" "${train_args[@]}"
"$longmem" eval --run "$out" --data "$held_out" --memory-tokens 65536 --score-from 65536 \
  --document-tokens 69632 --cache-states "${eval_args[@]}"
