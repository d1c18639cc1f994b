# The image of executor=docker, and of a cluster that runs containers:
#
#   docker build -t fiddlehead .
#   docker build -t fiddlehead --build-arg FLASH_ATTN=2.8.3 --build-arg MAX_JOBS=8 .
#
# The layers are in the order of how seldom they change: a change of the code repeats the last two only.

# CUDA of the compiler, which only FLASH_ATTN=2.* needs; PyTorch's wheels bring their own, of TORCH_INDEX_URL.
ARG CUDA_VERSION=13.0.2
ARG BUILD_IMAGE=nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04
ARG BASE_IMAGE=nvidia/cuda:${CUDA_VERSION}-base-ubuntu24.04

FROM ${BUILD_IMAGE} AS python
# One that the images' distribution has: 3.12 in Ubuntu 24.04, 3.11 in Debian 12, 3.13 in Debian 13.
ARG PYTHON_VERSION=3.12
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates g++ python${PYTHON_VERSION}-dev python${PYTHON_VERSION}-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python${PYTHON_VERSION} -m venv /opt/venv

FROM python AS build
# "" is pip's usual index.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==${TORCH_VERSION}"

# After PyTorch and without isolation: its extension has to match the PyTorch that is there. "none", a 2.* that is
# compiled here, each of MAX_JOBS files at once taking some GB of memory, or a 4.* that needs no compiler.
ARG FLASH_ATTN=none
ARG MAX_JOBS=4
RUN case "$FLASH_ATTN" in \
        none) ;; \
        4.*) pip install "flash-attn-4[cu13]==${FLASH_ATTN}" ;; \
        *) pip install ninja packaging psutil setuptools wheel \
            && MAX_JOBS=${MAX_JOBS} pip install --no-build-isolation "flash-attn==${FLASH_ATTN}" ;; \
    esac

# In the versions that the tests ran with, and from the same files.
COPY requirements/lock.txt /
RUN pip install --no-deps --require-hashes -r /lock.txt

FROM ${BASE_IMAGE}
ARG PYTHON_VERSION=3.12
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
# Triton compiles the kernels' launchers on first use, hence the compiler and Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python${PYTHON_VERSION} python${PYTHON_VERSION}-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --shell /bin/bash fiddlehead
COPY --from=build /opt/venv /opt/venv

WORKDIR /opt/fiddlehead
COPY . .
RUN pip install --no-deps --no-build-isolation . && pip check

# executor=docker runs as whoever launches; this is for runs by hand.
USER fiddlehead
WORKDIR /home/fiddlehead
CMD ["fiddlehead", "--help"]
