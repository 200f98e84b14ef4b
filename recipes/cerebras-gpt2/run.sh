#!/bin/sh
# MODE: validate_only, compile_only, train, eval or train_and_eval, as their run.py has them.
# SIZE: small or medium. DATA: Cerebras' HDF5 files. Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/cerebras-gpt2/${SIZE:-small}.yaml
data=${DATA:-data/cerebras}

case ${MODE:-train_and_eval} in
  validate_only) verbs="plan" ;;
  compile_only) verbs="plan compile" ;;
  train) verbs="plan compile train" ;;
  eval) verbs="evaluate" ;;
  train_and_eval) verbs="plan compile train evaluate" ;;
  *) echo "MODE=$MODE is none of validate_only, compile_only, train, eval, train_and_eval" >&2; exit 2 ;;
esac
penstock inspect "$data"
for verb in $verbs; do
  penstock "$verb" --config $config data.path="$data" "$@"
done
