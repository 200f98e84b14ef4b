#!/bin/sh
# Plans of the jobs on several cards.
set -eu
cd "$(dirname "$0")/../.."
for job in clm-gpt2-8x clm-gptj clm-neox; do
  penstock plan --config recipes/habana-lm/$job.yaml "$@"
done
