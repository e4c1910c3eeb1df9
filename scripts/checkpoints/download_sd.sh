#!/usr/bin/env bash
# Stable Diffusion v2 base: 512-base-ema.ckpt, 5.2 GB.
exec "$(dirname "$0")/../sd-perf" fetch stable-diffusion \
    --output-dir "${OUTPUT_DIR:-/checkpoints/sd}" \
    "$@"
