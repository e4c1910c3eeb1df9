#!/usr/bin/env bash
# The benchmark's training set as pictures: 832 shards.
exec "$(dirname "$0")/../sd-perf" fetch laion400m-images \
    --output-dir "${OUTPUT_DIR:-/datasets/laion-400m/webdataset-filtered}" \
    "$@"
