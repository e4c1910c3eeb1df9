#!/usr/bin/env bash
# The rows of LAION-400M's metadata whose picture has a known licence.
exec "$(dirname "$0")/../sd-perf" data filter-metadata \
    --input-metadata-dir "${INPUT_METADATA_DIR:-/datasets/laion-400m/metadata}" \
    --output-metadata-dir "${OUTPUT_METADATA_DIR:-/datasets/laion-400m/metadata-filtered}" \
    "$@"
