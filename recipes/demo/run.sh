#!/bin/sh
# The main job on real text: prepare, plan, compile, train, evaluate, generate.
# What has not changed since the last time is reused.
set -eu
cd "$(dirname "$0")/../.."
config=recipes/demo/demo.yaml
run=build/demo/run

penstock prepare --config $config
penstock plan --config $config
penstock compile --config $config
penstock train --config $config
penstock evaluate --config $config
penstock generate --config $config generate.input=recipes/demo/prompts.jsonl generate.output=$run/samples.jsonl
penstock generate --config $config generate.prompt='def read_lines(path):
    """Return'
penstock report --config $config
