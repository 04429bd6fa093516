"""/v1/files and /v1/batches: OpenAI's Batch API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse

from gateway.batches.files import PURPOSES, FileStore
from gateway.batches.runner import BatchRunner, public_batch
from gateway.errors import ApiError
from gateway.middleware import CLIENT_CLOSED_REQUEST
from gateway.openapi import body_schema, error_responses
from gateway.schemas import RequestModel
from gateway.serving import read_body

router = APIRouter(tags=["batches"])
_STORED = error_responses(401, 404)
# What a form may add around its file. A file that misses the limit by less is refused once it has come.
_FORM_BYTES = 1 << 16
Limit = Annotated[int, Query(ge=1, le=10_000)]


class CreateBatchBody(RequestModel):
    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)
    output_expires_after: dict[str, Any] | None = Field(None, description="Taken, and without effect.")


@router.post(
    "/v1/files",
    summary="Upload a file",
    responses=error_responses(400, 401, 413, 415),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "purpose": {"enum": list(PURPOSES)},
                        },
                        "required": ["file", "purpose"],
                    }
                }
            },
        }
    },
)
async def create_file(request: Request) -> Response:
    files: FileStore = request.app.state.files
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "Send the file as multipart/form-data.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit():
        await files.check_room(int(announced) - _FORM_BYTES)
    try:
        form = await request.form(max_files=1, max_fields=16)
    except HTTPException as error:
        raise ApiError(400, f"The form cannot be read: {error.detail}") from error
    except ClientDisconnect as error:
        # Nobody hears it: for the metrics and the log.
        raise ApiError(CLIENT_CLOSED_REQUEST, "The client left before its file was complete.") from error
    try:
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise ApiError(400, "file: needed, as a part with a file name.", param="file")
        if purpose not in PURPOSES:
            raise ApiError(400, f"purpose: must be one of {', '.join(PURPOSES)}.", param="purpose")
        file = await files.create(upload.file, (upload.filename or "file")[:255], str(purpose))
    finally:
        await form.close()
    return _json(file.to_json())


@router.get("/v1/files", summary="The files there are", responses=error_responses(400, 401))
async def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Limit = 10_000,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    files: FileStore = request.app.state.files
    found = [file.to_json() for file in await files.list_all() if purpose is None or file.purpose == purpose]
    return _page(found if order == "desc" else found[::-1], limit, after)


@router.get("/v1/files/{file_id}", summary="One of them", responses=_STORED)
async def get_file(request: Request, file_id: str) -> Response:
    files: FileStore = request.app.state.files
    return _json((await files.get(file_id)).to_json())


@router.get("/v1/files/{file_id}/content", summary="Its content", responses=_STORED, response_class=Response)
async def get_content(request: Request, file_id: str) -> Response:
    files: FileStore = request.app.state.files
    file = await files.get(file_id)
    path = files.path(file.id)
    if not path.is_file():
        raise ApiError(404, f"The content of file '{file_id[:80]}' is gone.", code="file_not_found")
    return FileResponse(path, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", summary="Delete it", responses=_STORED)
async def delete_file(request: Request, file_id: str) -> Response:
    files: FileStore = request.app.state.files
    await files.delete(file_id)
    return _json({"id": file_id, "object": "file", "deleted": True})


@router.post(
    "/v1/batches",
    summary="Run the requests of a file",
    responses=error_responses(400, 401, 404, 413, 415),
    openapi_extra=body_schema(CreateBatchBody),
)
async def create_batch(request: Request) -> Response:
    runner: BatchRunner = request.app.state.batches
    body = await read_body(request, CreateBatchBody)
    return _json(public_batch(await runner.create(body.input_file_id, body.endpoint, body.metadata)))


@router.get("/v1/batches", summary="The batches there are", responses=error_responses(400, 401))
async def list_batches(request: Request, limit: Limit = 20, after: str | None = None) -> Response:
    runner: BatchRunner = request.app.state.batches
    return _page([public_batch(batch) for batch in await runner.list_all()], limit, after)


@router.get("/v1/batches/{batch_id}", summary="One of them, and how far it is", responses=_STORED)
async def get_batch(request: Request, batch_id: str) -> Response:
    runner: BatchRunner = request.app.state.batches
    return _json(public_batch(await runner.get(batch_id)))


@router.post(
    "/v1/batches/{batch_id}/cancel",
    summary="Stop it; what was answered is kept",
    responses=error_responses(401, 404, 409),
)
async def cancel_batch(request: Request, batch_id: str) -> Response:
    runner: BatchRunner = request.app.state.batches
    return _json(public_batch(await runner.cancel(batch_id)))


def _page(found: Sequence[dict[str, Any]], limit: int, after: str | None) -> Response:
    if after is not None:
        position = next((index for index, item in enumerate(found) if item["id"] == after), None)
        if position is None:
            raise ApiError(400, f"after: there is no '{after[:80]}'.", param="after")
        found = found[position + 1 :]
    page = found[:limit]
    return _json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(found) > limit,
        }
    )


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
