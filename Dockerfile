# The benchmark's image: docker build -t mlperf/stable_diffusion .
# NVIDIA's PyTorch image has torch, Triton, Apex, Transformer Engine, FlashAttention and DALI, built for each other; they stay
# as they are. The digest is that of the tag's list of platforms in July 2026.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3@sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1
# hadolint ignore=DL3006
FROM ${BASE}

LABEL org.opencontainers.image.title="sd-perf" \
      org.opencontainers.image.description="Trainer of the MLPerf text-to-image benchmark (Stable Diffusion v2)" \
      org.opencontainers.image.licenses="Apache-2.0"

# 0: leave out what needs CUDA's compiler, on a base without it (make test-image)
ARG GPU=1
# Apex whose signatures the adapters fit (sd-perf doctor names them)
ARG APEX=6424da3b
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends git tini && rm -rf /var/lib/apt/lists/*

# The image's own Apex may lack the NHWC group norm.
RUN if [ "$GPU" = 1 ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_GROUP_NORM=1 APEX_DISTRIBUTED_ADAM=1 \
        python3 -m pip install --no-build-isolation --no-deps "apex @ git+https://github.com/NVIDIA/apex@${APEX}"; \
    fi

COPY . /opt/sd-perf
# What the base brings is a constraint: nothing below replaces it.
RUN python3 -c "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions() \
        if d.name.lower().startswith(('torch', 'triton', 'numpy', 'nvidia-dali'))), sep='\n')" > /tmp/base.txt && \
    python3 -m pip install --constraint /tmp/base.txt --editable '/opt/sd-perf[cli,images,mlperf,onnx,report,text]' && \
    python3 -m compileall -q /opt/sd-perf/sd_perf /opt/sd-perf/kernels && \
    install /opt/sd-perf/scripts/docker/entrypoint.sh /usr/local/bin/enter && \
    useradd --create-home --uid 10001 trainer && install --directory --owner 10001 /pwd /results

USER 10001
WORKDIR /pwd
RUN sd-perf doctor
ENTRYPOINT ["tini", "--", "enter"]
CMD ["bash"]
