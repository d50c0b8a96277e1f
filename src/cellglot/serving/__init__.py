"""What a public demo needs: files of strangers read safely, limits on what a request may cost, one way to serve."""

from .bundles import bundle, keep, preparing
from .deadline import Deadline, TooSlow
from .genes import name_genes
from .interface import STATUS_HEIGHT, blocks, choose_cells, forget, in_words, launch, model_queue, uploaded_cells
from .uploads import Limits, UploadError, counted, read_upload, sampled

__all__ = [
    "STATUS_HEIGHT",
    "Deadline",
    "Limits",
    "TooSlow",
    "UploadError",
    "blocks",
    "bundle",
    "choose_cells",
    "counted",
    "forget",
    "in_words",
    "keep",
    "launch",
    "model_queue",
    "name_genes",
    "preparing",
    "read_upload",
    "sampled",
    "uploaded_cells",
]
