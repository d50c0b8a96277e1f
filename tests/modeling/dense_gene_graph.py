"""The gene-graph model written out, oracle of the sparse one: every (genes x genes) matrix dense, nothing folded."""

import torch


def dense_mask(pairs: torch.Tensor, n_genes: int, diagonal: int) -> torch.Tensor:
    """(g, g) True on the edges."""
    mask = torch.zeros(n_genes, n_genes, dtype=torch.bool)
    i, j = pairs.long().unbind(1)
    mask[i, j] = mask[j, i] = True
    return mask | torch.eye(n_genes, dtype=torch.bool) if diagonal else mask


def dense_smoothed(model, expression: torch.Tensor) -> torch.Tensor:
    """(n, g) what `GeneGraphModel.smooth` gives, by equations 1 to 4 as they stand."""
    config, network = model.config, model.network
    mask = dense_mask(network.pairs, config.n_genes, config.diagonal)
    scores = torch.zeros(mask.shape, dtype=expression.dtype)
    i, j = network.pairs.long().unbind(1)
    scores[i, j] = scores[j, i] = network.scores.to(expression.dtype)
    if config.diagonal:
        scores.fill_diagonal_(1.0)
    if config.score_scaling == "degree":
        degree = scores.sum(dim=1).clamp(min=1e-9)
        scores = scores / (degree.unsqueeze(0) * degree.unsqueeze(1)).sqrt()
    features = model.lift(expression.unsqueeze(-1))  # (n, g, d)
    for layer in model.smoothing:
        out = 0
        for kind, dense in layer.dense.items():
            graph = scores
            if kind == "individual":
                weights = layer.theta(features) @ layer.phi(features).transpose(1, 2) / config.attention_size**0.5
                graph = weights.masked_fill(~mask, -torch.inf).softmax(dim=-1)
                # A gene without neighbours has no graph rather than 0 / 0.
                graph = torch.where(mask.any(dim=1).unsqueeze(-1), graph, 0.0)
            out = out + dense(graph @ features).relu()
        features = out
    smoothed = model.readout(features).squeeze(-1)
    return expression + smoothed if config.residual else smoothed
