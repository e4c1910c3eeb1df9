#!/usr/bin/env bash
# Raw shards of LAION-400M's pictures to shards of moments, which training reads.
here=$(dirname "$0")
exec "$here/../sd-perf" data convert \
    --config "$here/../../configs/train_512_moments.yaml" \
    --input-folder "${INPUT_FOLDER:-/datasets/laion-400m/webdataset-filtered}" \
    --output-dir "${OUTPUT_FOLDER:-/datasets/laion-400m/webdataset-moments-filtered}" \
    --checkpoint "${CHECKPOINT:-/checkpoints/sd/512-base-ema.ckpt}" \
    "$@"
