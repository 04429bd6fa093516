"""Probes and metrics."""

from __future__ import annotations

import asyncio

import stepwire
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.answers import LoadAnswer, VersionAnswer
from gateway.client import ControlPlaneClient
from gateway.errors import control_plane_unreachable, draining
from gateway.metrics import GatewayMetrics
from gateway.middleware import Lifecycle
from gateway.openapi import error_responses

router = APIRouter(tags=["operations"])


@router.get("/health", summary="The process lives")
async def health() -> Response:
    return Response(b'{"status":"ok"}', media_type="application/json")


@router.get("/ready", summary="Requests would be served now", responses=error_responses(503))
async def ready(request: Request) -> Response:
    lifecycle: Lifecycle = request.app.state.lifecycle
    client: ControlPlaneClient = request.app.state.client
    if lifecycle.draining:
        raise draining()
    if not await client.serving():
        raise control_plane_unreachable()
    return Response(b'{"status":"ready"}', media_type="application/json")


@router.get(
    "/load",
    summary="Requests being answered now, this one left out",
    responses={200: {"model": LoadAnswer}, **error_responses(401)},
)
async def load(request: Request) -> Response:
    metrics: GatewayMetrics = request.app.state.metrics
    return Response(
        LoadAnswer(server_load=metrics.num_in_flight() - 1).model_dump_json(), media_type="application/json"
    )


@router.get(
    "/version",
    summary="stepwire's version",
    responses={200: {"model": VersionAnswer}, **error_responses(401)},
)
async def version() -> Response:
    return Response(VersionAnswer(version=stepwire.__version__).model_dump_json(), media_type="application/json")


@router.get("/metrics", summary="Metrics of this gateway, for Prometheus")
async def metrics(request: Request) -> Response:
    own: GatewayMetrics = request.app.state.metrics
    return Response(await asyncio.to_thread(own.page), media_type=CONTENT_TYPE_LATEST)
