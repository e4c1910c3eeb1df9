#!/usr/bin/env bash
# Builds the image. usage: build.sh [-s|--src-img BASE] [-d|--dst-img TAG] [further options of docker build]
set -euo pipefail
root=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../..
tag=mlperf/stable_diffusion
options=()
while [ $# -gt 0 ]; do
    case $1 in
        -s | --src-img) options+=(--build-arg "BASE=${2:?$1 needs an image}") && shift 2 ;;
        -d | --dst-img) tag=${2:?$1 needs a tag} && shift 2 ;;
        *) options+=("$1") && shift ;;
    esac
done
exec docker build --tag "$tag" "${options[@]}" "$root"
