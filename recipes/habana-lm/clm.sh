#!/bin/sh
# run_clm.py: own files or WikiText-2, fine-tuning or from scratch, then evaluation alone.
# From scratch with other sizes: model.from=null model.family=gpt2 model.layers=48 model.hidden_size=1024.
# Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/habana-lm/clm-gpt2.yaml

penstock prepare --config $config "$@"
penstock train --config $config "$@"
penstock evaluate --config $config "$@"
