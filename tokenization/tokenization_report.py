"""What a tokenization saw of the cells and genes it was given."""

from dataclasses import dataclass

from .gene_ids import GeneMatch


@dataclass
class TokenizationReport:
    """What a tokenization saw, filled while it runs."""

    name: str = ""
    n_cells: int = 0
    n_empty_cells: int = 0
    n_truncated_cells: int = 0
    n_genes: int = 0
    n_matched_genes: int = 0
    n_collapsed_genes: int = 0
    total_counts: float = 0.0
    matched_counts: float = 0.0

    @property
    def matched_share(self) -> float:
        """Share of all counts that fall on genes of the vocabulary."""
        return self.matched_counts / self.total_counts if self.total_counts else 1.0

    def add_genes(self, match: GeneMatch) -> None:
        """Adds the columns of a file."""
        self.n_genes += len(match.index_g)
        self.n_matched_genes += match.n_matched
        self.n_collapsed_genes += match.n_collapsed

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.n_cells:,} cells; {self.n_matched_genes:,} of {self.n_genes:,} genes and "
            f"{self.matched_share:.1%} of counts in the vocabulary; {self.n_collapsed_genes:,} columns summed into "
            f"another; {self.n_truncated_cells:,} cells truncated, {self.n_empty_cells:,} empty"
        )
