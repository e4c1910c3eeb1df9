#!/usr/bin/env bash
# Executes the Dockerfile where there is neither Docker nor a GPU: on a Debian root file system with torch, by buildah, in a
# folder. usage: test_image.sh FOLDER   (root; apt-get install buildah mmdebstrap crun fuse-overlayfs; about six minutes)
# TORCH is what pip installs as torch. Files of CA and WHEELS (folders) are mounted where a network needs them.
set -euo pipefail
folder=$(realpath -m "${1:?usage: test_image.sh FOLDER}")
source=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
torch=${TORCH:-torch==2.13.0}
mkdir -p "$folder/base"

mounts=()
[ -z "${WHEELS:-}" ] || mounts+=(--volume "$WHEELS:/wheels:ro" --env PIP_FIND_LINKS=/wheels)
if [ -n "${CA:-}" ]; then
    mounts+=(--volume "$CA:/ca:ro")
    for name in PIP_CERT SSL_CERT_FILE REQUESTS_CA_BUNDLE; do mounts+=(--env "$name=/ca/ca-certificates.crt"); done
fi
own=(buildah --root "$folder/root" --runroot "$folder/run" --storage-driver overlay)
build=("${own[@]}" build --layers --isolation chroot --network host "${mounts[@]}")

if [ ! -f "$folder/base/rootfs.tar" ]; then
    mmdebstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$folder/rootfs.tar"
    mv "$folder/rootfs.tar" "$folder/base/"
fi
cat > "$folder/base/Dockerfile" <<FILE
FROM scratch
ADD rootfs.tar /
RUN python3 -m pip install --break-system-packages --no-cache-dir '$torch' triton
FILE
"${build[@]}" --tag base "$folder/base"
"${build[@]}" --build-arg BASE=localhost/base --build-arg GPU=0 --tag sd-perf "$source"

# What docker run would: the entry point, the user, the folder. In it the image is tried by a run.
container=$("${own[@]}" from localhost/sd-perf)
trap '"${own[@]}" rm "$container" > /dev/null' EXIT
inside=("${own[@]}" run --isolation chroot --env HOME=/tmp "$container" -- tini -- enter)
"${inside[@]}" sd-perf doctor
# shellcheck disable=SC2016  # that is for the shell inside
"${inside[@]}" sh -ec 'test "$(id -u)" = 10001; cd /tmp; cat > tiny.yaml
    sd-perf train --config tiny.yaml; /opt/sd-perf/run_and_time.sh --config tiny.yaml --results-dir /results' <<FILE
run: {dir: /tmp/run}
model: {model_channels: 32, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [2], num_head_channels: 32,
        context_dim: 16}
data: {format: synthetic, latent_size: 8, context_tokens: 3}
training: {global_batch_size: 4, max_samples: 40, precision: fp32}
checkpoint: {every_samples: 40}
FILE
echo "the image works"
