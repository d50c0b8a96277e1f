"""How every Space is served: limits, no telemetry, one look, and errors in words."""

import os
from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from pathlib import Path
from threading import Thread
from traceback import walk_tb
from typing import Any

from .deadline import TooSlow
from .uploads import UploadError

# Before Gradio is imported, which reads them once
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

MAX_WAITING = 64
MAX_SESSIONS = 64
UPLOADS = "cellglot-uploads"
# Pixels that the text of `model_queue` needs to show progress in
STATUS_HEIGHT = 60
CSS = ".gradio-container { max-width: 1100px !important; margin: 0 auto; }"


def blocks(title: str) -> Any:
    """An empty `gradio.Blocks` that sends nothing home, with a folder for uploads that nothing else is kept in."""
    from gradio.utils import get_upload_folder

    from .gate import GuardedBlocks

    folder = Path(get_upload_folder())
    if folder.name != UPLOADS:
        # All in it that is old will be swept
        os.environ["GRADIO_TEMP_DIR"] = str(folder / UPLOADS)
    return GuardedBlocks(title=title, analytics_enabled=False)


def launch(demo: Any, *, warm_up: Callable[[], Any] | None = None, **options: Any) -> Any:
    """Serves the Blocks; MAX_WAITING requests wait at most.

    warm_up  runs beside, so that the first visitor does not wait for what is compiled or computed once
    options  further ones of `Blocks.launch`
    """
    from gradio.themes import Soft
    from starlette.middleware import Middleware

    from .gate import MAX_UPLOAD, Gate, guard_queue, sweep_regularly

    if warm_up is not None:
        Thread(target=warm_up, daemon=True).start()
    # A closed API is still there for gradio_client, which queues
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    guard_queue(demo._queue)
    Thread(target=sweep_regularly, args=[demo._queue], daemon=True).start()
    settings: dict[str, Any] = {
        "theme": Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css": CSS,
        "max_file_size": MAX_UPLOAD,
        "app_kwargs": {"middleware": [Middleware(Gate)]},
        # Errors in words are shown all the same
        "show_error": False,
        "state_session_capacity": MAX_SESSIONS,
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,
        "mcp_server": False,
        "footer_links": ["api"],
    }
    return demo.launch(**(settings | options))


def model_queue(status: Any) -> dict[str, Any]:
    """Options of an event that runs the model: they take turns, whichever button they come from.

    status  the Markdown that shows progress and failure; Gradio would cover every earlier result with them
    """
    return {"concurrency_id": "model", "concurrency_limit": 1, "show_progress_on": status}


def forget(file: Any, *, after: Any) -> None:
    """Empties the box of a file once its event has ended, as the server has it no longer."""
    after.then(None, None, file, js="() => null")


def choose_cells(examples: str, label: str = "Your cells (.h5ad, raw counts)") -> tuple[Any, Any, Any]:
    """Inside Blocks: the button for built-in cells, the file, and the button for the file, as every Space begins.

    examples  what the built-in cells are, in Markdown
    """
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=280):
            from_examples = gr.Button("Analyse the built-in cells", variant="primary")
            gr.Markdown(examples)
        with gr.Column(min_width=280):
            file = gr.File(label=label, file_types=[".h5ad"], height=165)
            from_file = gr.Button("Analyse my cells")
    return from_examples, file, from_file


def in_words(event: Callable[..., Any]) -> Callable[..., Any]:
    """The event handler, with errors that people can mend shown to them; of others `blocks` says that there was one."""
    import gradio as gr

    @wraps(event)
    def handler(*arguments: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from event(*arguments, **options)
        except gr.Error:
            raise
        except (TooSlow, ValueError) as error:
            # Those of other packages are not written for visitors
            if not raised_by(error, "cellglot", event.__module__):
                raise
            # Shown as HTML
            raise gr.Error(escape(str(error)[:600], quote=False), print_exception=False) from None

    return handler


def raised_by(error: BaseException, *packages: str) -> bool:
    """Whether code of one of the packages raised the error, rather than what it called."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    name = frame.f_globals.get("__name__", "")
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def uploaded_cells(path: str | None, read: Callable[[Path], Any]) -> Any:
    """What `read` gives for an uploaded file, which is removed at once.

    Raises  UploadError if there is none, or the path does not lie among the uploads
    """
    from .gate import is_upload

    if not path or not is_upload(path) or not os.path.isfile(path):
        raise UploadError(
            "Expected an .h5ad file, found none. Choose a file and wait until it is uploaded; one that was analysed is "
            "removed, so choose it again."
        )
    try:
        return read(Path(path))
    finally:
        Path(path).unlink(missing_ok=True)
