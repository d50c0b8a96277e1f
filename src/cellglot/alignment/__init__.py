"""Alignment of two sets of cells: point clouds in, a linear map or a coupling out. Tensors only, on any device."""

from .adversarial import AdversarialOptions as AdversarialOptions
from .matchability import Matchability as Matchability
from .methods import Alignment as Alignment
from .methods import adversarial_alignment as adversarial_alignment
from .methods import gene_alignment as gene_alignment
from .methods import ortholog_alignment as ortholog_alignment
from .methods import transport_alignment as transport_alignment
