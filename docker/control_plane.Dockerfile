# The control plane: its package, the gRPC contract, and what the extra `control-plane` of pyproject.toml names. No torch.
#
#   docker build -f docker/control_plane.Dockerfile -t stepwire-control-plane .
#   docker run -p 127.0.0.1:50051:50051 -v MODEL_DIRECTORY:/model:ro stepwire-control-plane \
#       --model /model --workers HOST:50061
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG UV_VERSION=0.13.9
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 VIRTUAL_ENV=/opt/stepwire
# Dependencies first, without the code: a change to the code keeps this layer.
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv "$VIRTUAL_ENV" \
    && uv pip install -c constraints.txt -r pyproject.toml --extra control-plane
COPY proto/stepwire /app/stepwire
COPY control_plane /app/control_plane
COPY docker/check_health.py LICENSE /app/
RUN python -m compileall -q /app

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="stepwire control plane" \
      org.opencontainers.image.description="Schedules every request of a stepwire server and drives its workers" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 stepwire \
    && useradd --uid 10001 --gid stepwire --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin stepwire
COPY --from=build /opt/stepwire /opt/stepwire
COPY --from=build /app /app
ENV PATH=/opt/stepwire/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    STEPWIRE_GRPC_HOST=0.0.0.0 STEPWIRE_METRICS_HOST=0.0.0.0
WORKDIR /app
USER 10001:10001
EXPOSE 50051 8001
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "/app/check_health.py", "grpc://127.0.0.1:50051"]
ENTRYPOINT ["python", "-m", "control_plane"]
