#!/usr/bin/env bash
# The network behind the CLIP score: open_clip_pytorch_model.bin, 3.9 GB.
exec "$(dirname "$0")/../sd-perf" fetch clip \
    --output-dir "${OUTPUT_DIR:-/checkpoints/clip}" \
    "$@"
