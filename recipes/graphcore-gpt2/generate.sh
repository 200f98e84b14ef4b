#!/bin/sh
# Interactive generation: asks for prompts on the terminal until there are none, or goes on from PROMPT.
# Without a run, name a model: generate.sh run=null model.from=gpt2. Further keys go to the verb.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/graphcore-gpt2/${SIZE:-small}.yaml

if [ -n "${PROMPT:-}" ]; then
  penstock generate --config $config generate.prompt="$PROMPT" "$@"
else
  penstock generate --config $config "$@"
fi
