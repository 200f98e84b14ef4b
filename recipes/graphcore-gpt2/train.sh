#!/bin/sh
# Text to TFRecord, as their preprocessing makes it, and to Megatron's format; training on one
# device; WikiText and LAMBADA; a continued prompt (without one, `generate` asks on the terminal).
# Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/graphcore-gpt2/${SIZE:-small}.yaml
work=build/graphcore-gpt2
here="plan.target=detect plan.layers_per_stage=null plan.replicas=1 plan.shard=none"

penstock prepare --config $config "$@"
penstock convert dataset --config $config from=$work/tfrecord out=$work/megatron "$@" data.format=megatron
penstock train --config $config $here data.path=$work/megatron data.format=megatron "$@"
penstock evaluate --config $config $here "$@"
penstock generate --config $config generate.prompt="${PROMPT:-The history of}" "$@"
