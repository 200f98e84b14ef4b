#!/bin/sh
# --validate_only, --compile_only, --mode train (which evaluates as it goes), --mode eval.
# SIZE: small or medium. DATA: Cerebras' HDF5 files. Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/cerebras-gpt2/${SIZE:-small}.yaml
data=${DATA:-data/cerebras}

penstock inspect "$data"
penstock plan --config $config data.path="$data" "$@"
penstock compile --config $config data.path="$data" "$@"
penstock train --config $config data.path="$data" "$@"
penstock evaluate --config $config data.path="$data" "$@"
