#!/usr/bin/env bash
# The statistics that FID compares with, of a folder of resized pictures.
exec "$(dirname "$0")/../sd-perf" data fid-statistics \
    --dataset-dir "${DATASET_DIR:-/datasets/coco2014/val2014_30k}" \
    --output-file "${OUTPUT_FILE:-/datasets/coco2014/val2014_30k_stats.npz}" \
    --features /checkpoints/inception/pt_inception-2015-12-05-6726825d.pth \
    "$@"
