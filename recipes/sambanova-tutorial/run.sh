#!/bin/sh
# The tutorial from end to end: prepare (HDF5, 1024), compile, train, evaluate, compile for
# inference with batch 1, generate 20 new tokens for each prompt, compare with the labels.
# SST2: a folder with train.tsv and dev.tsv (sentence TAB label). Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
recipe=recipes/sambanova-tutorial
work=build/sambanova-tutorial

python3 $recipe/prompts.py "${SST2:-data/sst2}" $work
penstock prepare --config $recipe/sst2.yaml "$@"
penstock plan --config $recipe/sst2.yaml "$@"
penstock compile --config $recipe/sst2.yaml "$@"
penstock train --config $recipe/sst2.yaml "$@"
penstock evaluate --config $recipe/sst2.yaml "$@"
penstock compile --config $recipe/sst2.yaml "$@" mode=generate executable=$work/inference.penstock
penstock generate --config $recipe/sst2.yaml "$@" executable=$work/inference.penstock
python3 $recipe/compare.py $work/predictions.jsonl $work/dev.jsonl
