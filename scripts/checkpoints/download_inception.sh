#!/usr/bin/env bash
# The network behind FID: pt_inception-2015-12-05-6726825d.pth, 96 MB.
exec "$(dirname "$0")/../sd-perf" fetch inception \
    --output-dir "${OUTPUT_DIR:-/checkpoints/inception}" \
    "$@"
