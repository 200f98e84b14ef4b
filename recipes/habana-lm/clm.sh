#!/bin/sh
# run_clm.py: fine-tuning on WikiText-2 or own files (source.path=FOLDER), then evaluation alone.
# JOB: clm-gpt2, clm-gpt2-8x, clm-gptj or clm-neox; PROCESSES: cards, 8 in all jobs but the first.
# From scratch: model.from=null model.family=gpt2 model.layers=48 model.hidden_size=1024 model.heads=16,
# which is their --model_type gpt2 --config_overrides "n_layer=48,n_embd=1024,n_head=16".
# Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/habana-lm/${JOB:-clm-gpt2}.yaml

penstock prepare --config $config "$@"
penstock train --config $config "$@" ${PROCESSES:+--processes "$PROCESSES"}
penstock evaluate --config $config "$@"
