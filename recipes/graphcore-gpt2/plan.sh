#!/bin/sh
# The three pretraining plans, with pictures of pipeline and memory in build/graphcore-gpt2.
set -eu
cd "$(dirname "$0")/../.."
for size in small medium large; do
  penstock plan --config recipes/graphcore-gpt2/$size.yaml "$@" out=build/graphcore-gpt2/plan-$size
done
