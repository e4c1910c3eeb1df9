#!/usr/bin/env bash
# The benchmark's 30,000 pictures of COCO 2014's validation set, resized to 512x512, and a caption of each.
exec "$(dirname "$0")/../sd-perf" data split-coco \
    --input-images-path /datasets/coco2014/val2014 \
    --input-coco-captions /datasets/coco2014/annotations/captions_val2014.json \
    --output-images-path /datasets/coco2014/val2014_30k \
    --output-tsv-file /datasets/coco2014/val2014_30k.tsv \
    "$@"
