#!/usr/bin/env bash
# The benchmark's 30,000 pictures of COCO 2014's validation set, resized to 512x512, and a caption of each.
exec "$(dirname "$0")/../sd-perf" data split-coco \
    --input-images-path "${INPUT_IMAGES_PATH:-/datasets/coco2014/val2014}" \
    --input-coco-captions "${INPUT_COCO_CAPTIONS:-/datasets/coco2014/annotations/captions_val2014.json}" \
    --output-images-path "${OUTPUT_IMAGES_PATH:-/datasets/coco2014/val2014_30k}" \
    --output-tsv-file "${OUTPUT_TSV_FILE:-/datasets/coco2014/val2014_30k.tsv}" \
    "$@"
