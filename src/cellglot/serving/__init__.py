"""What a public demo needs: files of strangers read safely, limits on what a request may cost, one way to serve."""

from .bundles import bundle, keep, preparing
from .deadline import Deadline, TooSlow
from .genes import name_genes
from .interface import MODEL_QUEUE, blocks, choose_cells, in_words, launch, uploaded_cells
from .uploads import Limits, UploadError, counted, read_upload, sampled

__all__ = [
    "MODEL_QUEUE",
    "Deadline",
    "Limits",
    "TooSlow",
    "UploadError",
    "blocks",
    "bundle",
    "choose_cells",
    "counted",
    "in_words",
    "keep",
    "launch",
    "name_genes",
    "preparing",
    "read_upload",
    "sampled",
    "uploaded_cells",
]
