"""A rotation between two point clouds that no discriminator can tell apart: no pair of cells, no shared gene is needed.

Pang & Tegnér 2020, section 2.2: W* = argmin over linear W of ||W X - Y||_D (equation 7), with a generator of one linear
layer without activation, a multilayer perceptron D as discriminator, learning rate 3e-5 and batches of 1,024. What the
paper leaves open is after Conneau, Lample et al., ICLR 2018 (arXiv:1710.04087) and the code they released: label
smoothing, dropout of D's input, five steps of D to one of W, W held near the orthogonal matrices, the unsupervised
criterion (mean cosine of CSLS-matched points) that chooses the epoch and halves the learning rate.

Deviations, and why:
- Adam for both, since 3e-5 is a rate for Adam: Lample et al. use SGD at 0.1, with which 3e-5 would stand still.
- Both clouds are first divided by their root mean square, so that rates do not depend on units.
- W starts where the caller says. In principal components the identity, Lample's start, has arbitrary signs:
  `principal_axes_rotation` chooses them by skewness, or at random for further starts.

Axis letters: n source cells, m target cells, d components.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm.auto import tqdm

from .csls import mean_matched_cosine

# Two networks that chase each other do better without long momentum (Radford et al. 2016, arXiv:1511.06434).
ADAM_BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class AdversarialOptions:
    """Options of `adversarial_rotation`; defaults are the paper's, else those of Lample et al.

    learning_rate     of W and of the discriminator
    epoch_steps       steps of W in an epoch: about a million cells
    orthogonality     b of W <- (1 + b) W - b (W W^T) W after each step
    label_smoothing   targets of the discriminator are s and 1 - s
    criterion_cells   cells of each cloud that the criterion is measured on, at the most
    neighbours        k of CSLS
    """

    learning_rate: float = 3e-5
    batch_size: int = 1024
    epochs: int = 5
    epoch_steps: int = 1000
    discriminator_steps: int = 5
    hidden_size: int = 2048
    hidden_layers: int = 2
    dropout: float = 0.1
    label_smoothing: float = 0.1
    orthogonality: float = 0.01
    criterion_cells: int = 10_000
    neighbours: int = 10


@dataclass(frozen=True)
class AdversarialRotation:
    """What one start of `adversarial_rotation` found.

    rotation_dd  (d, d), orthogonal
    criterion    its mean cosine of CSLS-matched cells, the highest of `criteria`
    criteria     of the start and after each epoch
    losses       mean loss of the discriminator in each epoch: log 2 where it cannot tell the clouds apart
    """

    rotation_dd: torch.Tensor
    criterion: float
    criteria: list[float]
    losses: list[float]


class Discriminator(nn.Sequential):
    """(cells, d) -> (cells, 1) logit that a cell is a mapped one: layers of leaky ReLUs, with dropout of the input."""

    def __init__(self, n_components: int, options: AdversarialOptions):
        layers: list[nn.Module] = [nn.Dropout(options.dropout)]
        width = n_components
        for _ in range(options.hidden_layers):
            layers += [nn.Linear(width, options.hidden_size), nn.LeakyReLU(0.2)]
            width = options.hidden_size
        super().__init__(*layers, nn.Linear(width, 1))


def principal_axes_rotation(x_nd: torch.Tensor, y_md: torch.Tensor, seed: int | None = None) -> torch.Tensor:
    """(d, d) rotation of the principal axes of x onto those of y, the k-th onto the k-th.

    seed  None: both axes of a pair point to where their cloud is skewed to; else to a random side
    """
    axes_x, axes_y = _skewed_axes(x_nd), _skewed_axes(y_md)
    signs = torch.ones(len(axes_x))
    if seed is not None:
        signs = torch.randint(0, 2, (len(axes_x),), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return axes_y.T @ (signs[:, None].to(axes_x) * axes_x)


def random_rotation(x_nd: torch.Tensor, seed: int) -> torch.Tensor:
    """(d, d) any orthogonal matrix, all being equally likely, of the type and on the device of x."""
    gaussian = torch.randn(x_nd.shape[1], x_nd.shape[1], generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).to(x_nd)


def _skewed_axes(x_nd: torch.Tensor) -> torch.Tensor:
    """(d, d) principal axes, one a row, by variance; along each the third moment is positive."""
    centred = x_nd - x_nd.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)
    return axes * ((centred @ axes.T) ** 3).sum(dim=0).sign()[:, None]


def adversarial_rotation(
    x_nd: torch.Tensor,
    y_md: torch.Tensor,
    start_dd: torch.Tensor,
    options: AdversarialOptions | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> AdversarialRotation:
    """The rotation that makes mapped source cells look like target cells to a discriminator.

    x_nd      (source cells, d), y_md (target cells, d): floats on one device, centred, in no order
    start_dd  (d, d) orthogonal, e.g. `principal_axes_rotation(x_nd, y_md)`; itself a candidate
    seed      of weights, batches and dropout; the caller's random state is left as it is
    """
    options = options or AdversarialOptions()
    x_nd, y_md = (cloud / cloud.square().mean().sqrt() for cloud in (x_nd, y_md))
    device = x_nd.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        few_x, few_y = (cloud[torch.randperm(len(cloud))[: options.criterion_cells]] for cloud in (x_nd, y_md))
        discriminator = Discriminator(x_nd.shape[1], options).to(device, x_nd.dtype)
        w = start_dd.to(x_nd).clone().requires_grad_()
        of_d, of_w = (
            torch.optim.Adam(parameters, lr=options.learning_rate, betas=ADAM_BETAS)
            for parameters in (discriminator.parameters(), [w])
        )
        labels = x_nd.new_full((2 * options.batch_size,), options.label_smoothing)
        labels[: options.batch_size] = 1 - options.label_smoothing

        def logits() -> torch.Tensor:
            """(2 batch,) of mapped source cells, then of target cells, drawn anew."""
            x, y = (cloud[torch.randint(len(cloud), (options.batch_size,), device=device)] for cloud in (x_nd, y_md))
            return discriminator(torch.cat([x @ w.T, y]))[:, 0]

        best, criteria, losses, n_falls = start_dd, [_criterion(start_dd, few_x, few_y, options)], [], 0
        for epoch in range(options.epochs):
            total = torch.zeros((), device=device)
            steps = tqdm(range(options.epoch_steps), desc=f"epoch {epoch + 1}", disable=not progress, leave=False)
            for _ in steps:
                discriminator.train()
                w.requires_grad_(False)
                for _ in range(options.discriminator_steps):
                    loss = binary_cross_entropy_with_logits(logits(), labels)
                    of_d.zero_grad()
                    loss.backward()
                    of_d.step()
                    total += loss.detach() / options.discriminator_steps
                discriminator.eval()
                w.requires_grad_(True)
                of_w.zero_grad()
                # W is to have its cells taken for the other set's.
                binary_cross_entropy_with_logits(logits(), 1 - labels).backward(inputs=[w])
                of_w.step()
                with torch.no_grad():
                    w.copy_((1 + options.orthogonality) * w - options.orthogonality * (w @ w.T) @ w)
            losses.append(float(total) / options.epoch_steps)
            rotation = nearest_rotation(w.detach())
            criteria.append(_criterion(rotation, few_x, few_y, options))
            if criteria[-1] == max(criteria):
                best = rotation
            else:
                # As the released code: from the second epoch on that is worse than the best
                n_falls += 1
                if n_falls > 1:
                    of_w.param_groups[0]["lr"] /= 2
    return AdversarialRotation(best, max(criteria), criteria, losses)


def _criterion(w: torch.Tensor, x_nd: torch.Tensor, y_md: torch.Tensor, options: AdversarialOptions) -> float:
    return mean_matched_cosine(x_nd @ w.to(x_nd).T, y_md, options.neighbours)


def nearest_rotation(w: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to a square one."""
    u, _, vh = torch.linalg.svd(w)
    return u @ vh
