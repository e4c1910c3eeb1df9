#!/usr/bin/env bash
# The benchmark's training set as moments: 832 shards, about 0.9 TB.
exec "$(dirname "$0")/../sd-perf" fetch laion400m-moments \
    --output-dir "${OUTPUT_DIR:-/datasets/laion-400m/webdataset-moments-filtered}" \
    "$@"
