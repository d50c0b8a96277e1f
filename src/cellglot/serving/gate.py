"""What a Space answers over HTTP: what its page and gradio_client need, in limited sizes, and no file of the server.

Gradio alone would also fetch addresses that a visitor names, serve files, run an event past the queue, keep what an
aborted upload sent, tell visitors where the server's folders are, and let any of them end its queue.
"""

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import gradio as gr
from gradio.route_utils import API_PREFIX, GradioMultiPartParser
from gradio.routes import file_upload_statuses
from gradio.utils import get_upload_folder
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

# The routes below /gradio_api/ that are answered, by the first word of their path
ANSWERED = {
    *("app_id", "call", "cancel", "heartbeat", "info", "login_check", "openapi.json", "queue", "reset"),
    *("startup-events", "theme.css", "upload", "upload_progress"),
}
# Bytes: of an upload and the lines around it, of any other request, of all uploads that lie on disk together, and what
# the smallest upload counts there, which bounds their number
MAX_UPLOAD, HEADERS, MAX_BODY, MAX_STORED, LEAST = 200_000_000, 10_000, 1_000_000, 10_000_000_000, 1_000_000
UPLOAD_SECONDS = 900
# Seconds between sweeps, and the age at which uploads that nobody analysed go
SWEEP, MAX_AGE = 600, 1800
# Messages for a session that are kept until its client collects them, which one that listens does at once
MAX_UNREAD = 50
# Browsers then load nothing from other hosts, whatever an uploaded file calls its cells and genes
FROM_HERE = [(b"content-security-policy", b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:")]
UNEXPECTED = (
    "This could not be done: what was sent does not fit, or something failed on the server. "
    "Load the page again and try another choice."
)

log = logging.getLogger(__name__)


def is_upload(path: object) -> bool:
    """Whether a path that a visitor names lies among the uploads."""
    folder = os.path.realpath(get_upload_folder())
    try:
        return isinstance(path, str) and Path(os.path.realpath(path)).is_relative_to(folder)
    except ValueError:
        # It holds a NUL
        return False


def named_files(value: Any) -> Iterator[Any]:
    """The paths in the inputs of an event: in Gradio, what a dictionary calls `path` is a file, wherever it is."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from named_files(part)


class GuardedBlocks(gr.Blocks):
    """Blocks whose visitors name no files but uploads, and read errors in words."""

    async def process_api(self, block_fn: Any, inputs: list[Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            if not all(is_upload(path) for path in named_files(inputs)):
                raise gr.Error("Expected an uploaded file, found another path. Upload it.", print_exception=False)
            return await super().process_api(block_fn, inputs, *arguments, **options)
        except gr.Error:
            raise
        except Exception:
            log.exception("An event failed")
            raise gr.Error(UNEXPECTED, print_exception=False) from None


def at_most(limit: int, receive: Callable[[], Any]) -> Callable[[], Any]:
    """ASGI's `receive`, which ends the request once its body has more than `limit` bytes."""
    received = 0

    async def limited() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, too_large(limit))
        return message

    return limited


def from_here(send: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """ASGI's `send`, with the headers FROM_HERE."""

    async def with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *FROM_HERE]
        await send(message)

    return with_headers


def too_large(limit: int) -> str:
    return f"Expected at most {limit / 1e6:,.0f} MB, found more. Send less; of a file, upload fewer cells."


def stored_bytes(folder: Path) -> int:
    """What the uploads of a folder count, the small ones more than they have."""
    total = 0
    for home, _, names in os.walk(folder):
        for name in names:
            # One that is being analysed may go at any moment
            with contextlib.suppress(FileNotFoundError):
                total += max(os.stat(os.path.join(home, name)).st_size, LEAST)
    return total


class Gate:
    """ASGI middleware: routes that are not ANSWERED are not there, bodies are limited, uploads leave nothing behind."""

    def __init__(self, app: Any) -> None:
        self.app = app
        # Bytes of uploads that are on their way
        self.arriving = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app: Any = self.app
        if scope["type"] == "http":
            _, below, rest = scope["path"].partition(f"{API_PREFIX}/")
            route = rest.split("/")[0]
            limit = MAX_UPLOAD + HEADERS if route == "upload" else MAX_BODY
            receive = at_most(limit, receive)
            if below and route not in ANSWERED:
                app = PlainTextResponse("There is no such page.", 404)
            elif route == "upload":
                app = await self.upload(Request(scope, receive), limit)
            send = from_here(send)
        await app(scope, receive, send)

    async def upload(self, request: Request, limit: int) -> Response:
        """Keeps the one file of the request, in a folder whose name nobody can guess; nothing if that fails.

        Gradio keeps it by its name and the hash of its content: visitors with the same file would share one, which
        goes once the first is served.
        """
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else limit
        if size > limit:
            return PlainTextResponse(too_large(limit), 413)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return PlainTextResponse("Expected a form with a file.", 400)
        uploads = Path(get_upload_folder())
        if await anyio.to_thread.run_sync(stored_bytes, uploads) + self.arriving + size > MAX_STORED:
            return PlainTextResponse("Too many files are waiting on the server. Come back in some minutes.", 503)
        folder, kept = uploads / secrets.token_hex(16), False
        self.arriving += size
        try:
            folder.mkdir(parents=True)
            with anyio.fail_after(UPLOAD_SECONDS):
                path = await received_file(request, folder)
            kept = True
            return JSONResponse([str(path)])
        except HTTPException as error:
            return PlainTextResponse(error.detail, error.status_code)
        except TimeoutError:
            return PlainTextResponse(f"The upload took over {UPLOAD_SECONDS:,} seconds. Send fewer cells.", 408)
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            self.arriving -= size
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)


async def received_file(request: Request, folder: Path) -> Path:
    """Where in the folder the one file of a form lies, under a name of ours.

    Raises  HTTPException
    """
    upload_id = request.query_params.get("upload_id")
    parser = GradioMultiPartParser(
        request.headers,
        request.stream(),
        max_files=1,
        max_fields=0,
        upload_dir=folder,
        upload_id=upload_id,
        upload_progress=file_upload_statuses if upload_id else None,
        max_file_size=MAX_UPLOAD,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "File size exceeded" in error.message:
            raise HTTPException(413, too_large(MAX_UPLOAD)) from None
        raise HTTPException(400, error.message) from None
    for _, file in form.multi_items():
        if isinstance(file, UploadFile):
            await file.close()
            return Path(os.path.abspath(file.file.name)).rename(folder / "cells.h5ad")
    raise HTTPException(400, "Expected one file, found none.")


def guard_queue(queue: Any) -> None:
    """Has the queue of Blocks go on without a session that is gone, and keep MAX_UNREAD messages of each other.

    Gradio forgets the oldest of 2,000 sessions, and its queue ends, for all, with the first message for one of those:
    to join and cancel that often takes a stranger seconds.
    """
    unread, send = queue.pending_messages_per_session, queue.send_message

    def send_message(event: Any, message: Any) -> None:
        messages = unread.get(event.session_hash)
        if messages is None:
            return
        while messages.qsize() >= MAX_UNREAD:
            messages.get_nowait()
        messages.last_sent = time.monotonic()
        send(event, message)

    queue.send_message = send_message


def sweep(queue: Any, age: float) -> None:
    """Removes uploads older than `age` seconds, whatever left them, and results that nobody collected for as long."""
    for item in Path(get_upload_folder()).glob("*"):
        try:
            if time.time() - item.lstat().st_mtime > age:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        except FileNotFoundError:
            continue
    unread = queue.pending_messages_per_session
    for session, messages in list(unread.items()):
        if messages.qsize() and time.monotonic() - getattr(messages, "last_sent", 0) > age:
            unread.pop(session, None)


def sweep_regularly(queue: Any) -> None:
    while True:
        try:
            sweep(queue, MAX_AGE)
        except (OSError, RuntimeError):
            log.exception("A sweep failed")
        time.sleep(SWEEP)
