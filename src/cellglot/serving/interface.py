"""How every Space is served: limits, no telemetry, one look, and errors in words."""

import os
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from threading import Thread
from typing import Any

from .deadline import TooSlow
from .uploads import UploadError

# Before Gradio is imported, which reads them once
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

MAX_WAITING = 64
MAX_SESSIONS = 64
MAX_UPLOAD = "200mb"
# Seconds between sweeps of uploaded and drawn files, and the age at which they go; a session's go when its page closes
SWEEP, MAX_AGE = 600, 1800
# Of every event that runs the model: they take turns, whichever button they come from
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
CSS = ".gradio-container { max-width: 1100px !important; margin: 0 auto; }"


def blocks(title: str) -> Any:
    """An empty `gradio.Blocks` that sends nothing home and sweeps its files."""
    import gradio as gr

    return gr.Blocks(title=title, analytics_enabled=False, delete_cache=(SWEEP, MAX_AGE))


def launch(demo: Any, *, warm_up: Callable[[], Any] | None = None, **options: Any) -> Any:
    """Serves the Blocks; MAX_WAITING requests wait at most.

    warm_up  runs beside, so that the first visitor does not wait for what is compiled or computed once
    options  further ones of `Blocks.launch`
    """
    from gradio.themes import Soft

    if warm_up is not None:
        Thread(target=warm_up, daemon=True).start()
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    settings: dict[str, Any] = {
        "theme": Soft(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css": CSS,
        "max_file_size": MAX_UPLOAD,
        "show_error": True,
        "state_session_capacity": MAX_SESSIONS,
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "footer_links": ["api"],
    }
    return demo.launch(**(settings | options))


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
    """The event handler, with errors that people can mend shown to them, and others without details of the machine."""
    import gradio as gr

    @wraps(event)
    def handler(*arguments: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from event(*arguments, **options)
        except (UploadError, TooSlow, gr.Error) as error:
            raise gr.Error(str(error), print_exception=False) from None
        except ValueError as error:
            # cellglot's errors for a user's input
            raise gr.Error(str(error)[:600], print_exception=False) from None

    return handler


def uploaded_cells(path: str | None, read: Callable[[Path], Any]) -> Any:
    """What `read` gives for an uploaded file, which is removed at once.

    Raises  UploadError if there is none, or the path is not one that Gradio put an upload at
    """
    from gradio.utils import get_upload_folder

    if not path or not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise UploadError("Expected an .h5ad file, found none. Choose a file and wait until it is uploaded.")
    try:
        return read(Path(path))
    finally:
        Path(path).unlink(missing_ok=True)


def bundle(default: Path) -> Path:
    """The folder of a Space's model and example cells.

    default  where the Space's prepare.py leaves it; CELLGLOT_SPACE_MODEL names another folder, or a repository
    Raises   SystemExit if it is not there
    """
    name = os.environ.get("CELLGLOT_SPACE_MODEL")
    if name and not Path(name).is_dir():
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name))
    folder = Path(name or default)
    if not (folder / "about.json").is_file():
        raise SystemExit(
            f"Expected a model in {folder}, found none. Train one with `python {folder.parent / 'prepare.py'}`, or set "
            "CELLGLOT_SPACE_MODEL to the folder or the repository of one."
        )
    return folder
