#!/bin/sh
# run_lora_clm.py: Alpaca's data, adapters, and the adapter for peft.
# ALPACA: alpaca_data.json or seed_tasks.jsonl. Further keys go to every verb.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/habana-lm/lora-llama.yaml

python3 recipes/habana-lm/alpaca.py "${ALPACA:-data/alpaca_data.json}" build/habana-lm/alpaca.jsonl
penstock prepare --config $config "$@"
penstock train --config $config "$@"
penstock evaluate --config $config "$@"
penstock convert adapter --config $config "$@" out=build/habana-lm/adapter
