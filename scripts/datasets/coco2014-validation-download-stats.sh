#!/usr/bin/env bash
# The statistics that FID compares with: val2014_30k_stats.npz.
exec "$(dirname "$0")/../sd-perf" fetch coco2014-statistics \
    --output-dir "${OUTPUT_DIR:-/datasets/coco2014}" \
    "$@"
