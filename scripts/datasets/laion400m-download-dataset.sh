#!/usr/bin/env bash
# The pictures of LAION-400M's filtered metadata, as raw shards.
exec "$(dirname "$0")/../sd-perf" data download-images \
    --metadata-dir /datasets/laion-400m/metadata-filtered \
    --output-dir /datasets/laion-400m/webdataset-filtered \
    "$@"
