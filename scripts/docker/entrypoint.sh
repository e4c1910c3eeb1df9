#!/bin/sh
# Starts the command of a container by way of NVIDIA's own entry point, where the image has it: it sets up CUDA's
# compatibility libraries.
[ ! -x /opt/nvidia/nvidia_entrypoint.sh ] || set -- /opt/nvidia/nvidia_entrypoint.sh "$@"
exec "$@"
