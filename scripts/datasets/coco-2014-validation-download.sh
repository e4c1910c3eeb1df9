#!/usr/bin/env bash
# COCO's validation pictures of 2014 and their annotations, unpacked: 6.9 GB, and as much again.
exec "$(dirname "$0")/../sd-perf" fetch coco2014-validation \
    --output-dir "${DOWNLOAD_PATH:-/datasets/coco2014}" \
    "$@"
