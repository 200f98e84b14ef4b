#!/bin/sh
# Prepare, plan, compile, train, evaluate; weights in the Hugging Face layout and a summary at the end.
# PROCESSES: how many replicas train (their DP). Further keys go to every verb:
# plan.target=detect plan.replicas=1 plan.stages=null to train here.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/sambanova-modelzoo/llama2-7b.yaml
work=build/sambanova-modelzoo

penstock prepare --config $config "$@"
penstock plan --config $config "$@"
penstock compile --config $config "$@"
penstock train --config $config "$@" ${PROCESSES:+--processes "$PROCESSES"}
penstock evaluate --config $config "$@"
penstock convert checkpoint --config $config "$@" out=$work/hf
penstock inspect $work/run --json > $work/summary.txt
