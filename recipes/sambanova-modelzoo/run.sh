#!/bin/sh
# Prepare, plan, train, evaluate; weights in the Hugging Face layout and a summary at the end.
# Further keys go to every verb: plan.target=detect plan.replicas=1 plan.stages=null to train here.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/sambanova-modelzoo/llama2-7b.yaml
work=build/sambanova-modelzoo

penstock prepare --config $config "$@"
penstock plan --config $config "$@"
penstock train --config $config "$@"
penstock evaluate --config $config "$@"
penstock convert checkpoint --config $config "$@" out=$work/hf
penstock inspect $work/run --json > $work/summary.txt
