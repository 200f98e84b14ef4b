#!/bin/sh
# run_mlm.py: masked tokens, whole sequences or line by line, then evaluation alone.
# Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/habana-lm/mlm-roberta.yaml

penstock prepare --config $config "$@"
penstock train --config $config "$@"
penstock evaluate --config $config "$@"
