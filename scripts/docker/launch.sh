#!/usr/bin/env bash
# Starts the image with this folder at /pwd and the benchmark's folders where they are, as this user.
# usage: launch.sh [-d|--docker-img TAG] [-r|--results-dir DIR] [COMMAND ...]
set -euo pipefail
tag=mlperf/stable_diffusion
results=$PWD/results
while [ $# -gt 0 ]; do
    case $1 in
        -d | --docker-img) tag=${2:?$1 needs a tag} && shift 2 ;;
        -r | --results-dir) results=$(realpath "${2:?$1 needs a folder}") && shift 2 ;;
        *) break ;;
    esac
done

mkdir -p "$results"
mounts=(--volume "$PWD:/pwd" --volume "$results:/results")
for folder in /datasets /checkpoints /hf_home; do
    [ ! -d "$folder" ] || mounts+=(--volume "$folder:$folder")
done
terminal=()
[ ! -t 0 ] || terminal=(--interactive --tty)
exec docker run --rm "${terminal[@]}" --gpus=all --ipc=host --ulimit memlock=-1 --user "$(id -u):$(id -g)" \
    --env HOME=/tmp --workdir /pwd "${mounts[@]}" "$tag" "$@"
