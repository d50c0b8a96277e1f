"""What a public demo needs: files of strangers read safely, limits on what a request may cost, one way to serve."""

from .deadline import Deadline, TooSlow
from .interface import MODEL_QUEUE, blocks, bundle, choose_cells, in_words, launch, uploaded_cells
from .uploads import Limits, UploadError, read_upload, sampled

__all__ = [
    "MODEL_QUEUE",
    "Deadline",
    "Limits",
    "TooSlow",
    "UploadError",
    "blocks",
    "bundle",
    "choose_cells",
    "in_words",
    "launch",
    "read_upload",
    "sampled",
    "uploaded_cells",
]
