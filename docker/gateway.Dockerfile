# The REST gateway: its package, the gRPC contract, and what the extra `gateway` of pyproject.toml names. No torch.
#
#   docker build -f docker/gateway.Dockerfile -t stepwire-gateway .
#   docker run -p 127.0.0.1:8000:8000 stepwire-gateway --control-plane HOST:50051
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
    && uv pip install -c constraints.txt -r pyproject.toml --extra gateway
COPY proto/stepwire /app/stepwire
COPY gateway /app/gateway
COPY docker/check_health.py LICENSE /app/
RUN python -m compileall -q /app

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="stepwire gateway" \
      org.opencontainers.image.description="OpenAI's REST API over stepwire's control plane" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 stepwire \
    && useradd --uid 10001 --gid stepwire --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin stepwire \
    # For STEPWIRE_DATA_DIR: a named volume takes its owner from the directory that it is first mounted on.
    && install --directory --owner 10001 --group 10001 /data
COPY --from=build /opt/stepwire /opt/stepwire
COPY --from=build /app /app
ENV PATH=/opt/stepwire/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    STEPWIRE_HOST=0.0.0.0
WORKDIR /app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "/app/check_health.py", "http://127.0.0.1:8000/ready"]
ENTRYPOINT ["python", "-m", "gateway"]
