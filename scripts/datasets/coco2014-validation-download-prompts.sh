#!/usr/bin/env bash
# The 30,000 captions that pictures are drawn from: val2014_30k.tsv.
exec "$(dirname "$0")/../sd-perf" fetch coco2014-prompts \
    --output-dir "${OUTPUT_DIR:-/datasets/coco2014}" \
    "$@"
