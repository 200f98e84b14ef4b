#!/bin/sh
# Pretraining, then WikiText and LAMBADA. SIZE: small, medium or large; DATA: what is trained on,
#   tfrecord    Wikipedia's text as TFRecord files, as their preprocessing makes them (their tfrecord)
#   megatron    the same as Megatron's indexed file (their dynamic)
#   generated   random words, for throughput (their generated)
# Further keys go to every verb; source.path is the dump, or WikiExtractor's folder.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/graphcore-gpt2/${SIZE:-small}.yaml
data=${DATA:-tfrecord}
work=build/graphcore-gpt2
here="plan.target=detect plan.layers_per_stage=null plan.replicas=1 plan.shard=none"

case $data in
  tfrecord) penstock prepare --config $config "$@" ;;
  megatron)
    penstock prepare --config $config "$@"
    penstock convert dataset --config $config from=$work/tfrecord out=$work/megatron "$@" \
      data.format=megatron
    ;;
  generated)
    penstock prepare --config $config "$@" source.kind=generated data.path=$work/generated
    ;;
  *) echo "DATA=$data is none of tfrecord, megatron, generated" >&2; exit 2 ;;
esac
penstock train --config $config $here data.path="$work/$data" "$@"
penstock evaluate --config $config $here "$@"
