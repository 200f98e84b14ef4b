#!/bin/sh
# What else run_clm.py does: its DeepSpeed file as keys of ours; training straight from a stream of
# text; evaluation of a model as it comes, without training. TEXT: a folder of text.
# MODEL: a folder in the Hugging Face layout. Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
work=build/habana-lm
config=recipes/habana-lm/clm-gpt2.yaml
text=${TEXT:-data/wikitext-2}

penstock import-config recipes/habana-lm/deepspeed-zero2.json --from deepspeed out=$work/deepspeed-zero2.yaml
penstock train --config $config "$@" data.path=null data.streaming=true source.path="$text" \
  run=$work/clm-streamed train.epochs=null train.steps="${STEPS:-1000}"
penstock prepare --config $config "$@" source.path="$text"
penstock evaluate --config $config "$@" run=null model.from="${MODEL:-gpt2}"
