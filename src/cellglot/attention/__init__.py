"""Which genes, and which ranks, a Geneformer's attention heads look at.

Source: Theodoris et al., Nature 2023, Fig. 4e: in 20% of the pre-trained heads transcription factors are attended more
than other genes (rank-sum test over genes, false discovery rate 0.05), more so in early layers. The paper also reports
that heads differ in the ranks they survey. `python -m cellglot.attention --help` runs the whole analysis.
"""

from .collection import AttentionStatistics, attention_by_rank, attention_to_genes, collect_attention
from .comparison import compare_gene_sets, rank_diversity, summarize_heads
from .gene_sets import read_gene_sets, resolve_genes

__all__ = [
    "AttentionStatistics",
    "attention_by_rank",
    "attention_to_genes",
    "collect_attention",
    "compare_gene_sets",
    "rank_diversity",
    "read_gene_sets",
    "resolve_genes",
    "summarize_heads",
]
