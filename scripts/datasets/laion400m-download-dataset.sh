#!/usr/bin/env bash
# The pictures of LAION-400M's filtered metadata, as raw shards.
exec "$(dirname "$0")/../sd-perf" data download-images \
    --metadata-dir "${METADATA_DIR:-/datasets/laion-400m/metadata-filtered}" \
    --output-dir "${OUTPUT_DIR:-/datasets/laion-400m/webdataset-filtered}" \
    "$@"
