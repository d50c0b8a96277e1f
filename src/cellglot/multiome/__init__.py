"""Other ways to predict one modality of cells from the other, which the multiome models are measured against; and what
these models may begin with.

Matrices in, matrices out: every way is fitted with `fit(cells, target_nf)` and asked with `predict(cells)`, whether it
repeats the mean of the training cells or trains a network. Published ones are written anew from their description and
released code, each with what differs in its docstring.
"""

from .cajal import Cajal as Cajal
from .dance import Dance as Dance
from .dengkw import Dengkw as Dengkw
from .embeddings import begin_with_principal_embeddings as begin_with_principal_embeddings
from .embeddings import principal_embeddings as principal_embeddings
from .predictor import ModalityPredictor as ModalityPredictor
from .predictor import SourceCells as SourceCells
from .simple import Frequency as Frequency
from .simple import NearestCells as NearestCells
from .simple import SVDLinear as SVDLinear
from .simple import Zeros as Zeros
