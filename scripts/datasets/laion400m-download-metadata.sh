#!/usr/bin/env bash
# LAION-400M's metadata: 32 parquet files, about 54 GB.
exec "$(dirname "$0")/../sd-perf" fetch laion400m-metadata \
    --output-dir "${OUTPUT_DIR:-/datasets/laion-400m/metadata}" \
    "$@"
