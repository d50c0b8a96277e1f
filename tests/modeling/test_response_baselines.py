"""CPA and cVAE: their terms against formulas, and what they learn from planted effects."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.neighbors import KNeighborsClassifier
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from cellglot import CpaConfig, CpaModel, CvaeConfig, CvaeModel
from cellglot.modeling.baselines import configuration_cpa, configuration_cvae
from cellglot.modeling.baselines.modeling_cpa import ReverseGradient, gaussian_loss
from cellglot.modeling.baselines.modeling_cvae import divergence
from cellglot.registration import METHODS
from cellglot.train.loop import LoopConfig
from cellglot.train.loop import train as train_in_loop
from cellglot.train.metrics_log import read_metrics

GENES, DRUGS, LINES, BITS = 29, 3, 2, 11
SIZES: dict[str, Any] = {"n_genes": GENES, "n_drugs": DRUGS, "n_cell_lines": LINES, "hidden_size": 31}
NONE = -torch.inf


def tiny(model_class: Any, **options: Any) -> Any:
    config_class: Any = CpaConfig if model_class is CpaModel else CvaeConfig
    torch.manual_seed(0)
    return model_class(config_class(**{**SIZES, "latent_size": 7, "num_hidden_layers": 2, **options})).eval()


def planted(n: int = 600) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(cells = three programmes + effect of one of three drugs, or none, + line + noise; (drugs, g) the effects)."""
    rng = np.random.default_rng(0)
    drug, line, control = rng.integers(0, DRUGS, n), rng.integers(0, LINES, n), rng.random(n) < 0.25
    programmes, effects, lines = (scale * rng.normal(size=(k, GENES)) for scale, k in ((1, 3), (2, DRUGS), (2, LINES)))
    cells = rng.normal(size=(n, 3)) @ programmes + np.where(control[:, None], 0, effects[drug]) + lines[line]
    expression = torch.tensor(cells + 0.1 * rng.normal(size=cells.shape), dtype=torch.float32)
    batch = {
        "expression": expression,
        "cell_line": torch.tensor(line),
        "dose": torch.tensor(np.where(control, -np.inf, 0.0), dtype=torch.float32),
        "drug": torch.tensor(drug),
        "labels": expression,
    }
    return batch, torch.tensor(effects, dtype=torch.float32)


def first(batch: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    return {name: tensor[:n] for name, tensor in batch.items()}


# ---- CPA


def test_the_loss_of_means_and_variances_is_the_gaussian_one():
    means, labels = torch.randn(5, 7), torch.randn(5, 7)
    variances = torch.rand(5, 7) + 0.1
    assert_close(gaussian_loss(means, variances, labels), torch.nn.GaussianNLLLoss()(means, labels, variances))


def test_a_treated_state_is_basal_state_and_drug_times_dose_and_line():
    model, (batch, _) = tiny(CpaModel), planted(17)
    model.dose_response.curve.encode.weight.data.normal_()
    with torch.no_grad():
        found = model(**batch)
        slope, offset = model.dose_response.curve.encode.weight[batch["drug"]].split(1, dim=1)
        amount = (10 ** batch["dose"][:, None]).log1p()
        curve = ((slope + 1) * amount + offset).sigmoid() - offset.sigmoid()
        state = model.encoder(batch["expression"]) + curve * model.drug.encode.weight[batch["drug"]]
        means, spreads = model.decoder(state + model.cell_line.weight[batch["cell_line"]]).chunk(2, dim=1)
    assert_close(found.predictions, means)
    assert_close(found.variances, torch.nn.functional.softplus(spreads) + 1e-3)
    assert_close(found.reconstruction_loss, gaussian_loss(means, found.variances, batch["labels"]))


@pytest.mark.parametrize("model_class", [CpaModel, CvaeModel])
def test_controls_have_no_drug_and_unknown_lines_say_nothing(model_class):
    model, (batch, _) = tiny(model_class), planted(17)
    dose = torch.full((17,), NONE)
    with torch.no_grad():
        one, other = (
            model(batch["expression"], batch["cell_line"], dose, drug=torch.full((17,), d)).predictions for d in (0, 2)
        )
        assert_close(one, other)
        dosed = model(batch["expression"], batch["cell_line"], torch.zeros(17), drug=torch.full((17,), 0)).predictions
        assert (one - dosed).abs().max() > 1e-3
        unknown = model.cell_line(torch.tensor([LINES]))
    assert_close(unknown, torch.zeros_like(unknown))


def test_the_encoder_goes_against_the_adversaries_and_they_for_it():
    x = torch.randn(5, 3, requires_grad=True)
    (ReverseGradient.apply(x, 0.3) ** 2).sum().backward()
    assert_close(x.grad, -0.6 * x.detach())
    batch, _ = planted(37)
    gradients = {}
    for weight in (0.0, 1.0):
        model = tiny(CpaModel, adversary_weight=weight, gradient_penalty=0).train()
        model(**batch).adversary_loss.backward()
        adversary = model.adversaries["drug"][0].weight.grad
        gradients[weight] = (model.encoder[0].weight.grad, adversary)
    assert gradients[0.0][0].abs().max() == 0
    assert gradients[1.0][0].abs().max() > 0
    assert_close(gradients[0.0][1], gradients[1.0][1])
    # One step along the encoder's gradient makes the adversaries worse.
    model = tiny(CpaModel, adversary_weight=1.0)
    before = model(**batch).adversary_loss
    before.backward()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter -= 0.01 * parameter.grad
        assert model(**batch).adversary_loss > before


def test_the_gradient_penalty_is_the_adversaries_own():
    batch, _ = planted(37)
    model = tiny(CpaModel, gradient_penalty=1.0, adversary_weight=0).train()
    output = model(**batch)
    penalty = output.loss - output.reconstruction_loss - output.adversary_loss
    states = output.basal.detach().requires_grad_()
    expected = torch.zeros(())
    for adversary in model.adversaries.values():
        expected = expected + torch.autograd.grad(adversary(states).sum(), states)[0].square().mean()
    assert_close(penalty, expected)
    penalty.backward()
    assert model.encoder[0].weight.grad is None or model.encoder[0].weight.grad.abs().max() == 0
    assert model.adversaries["drug"][0].weight.grad.abs().max() > 0


def test_only_what_is_known_is_asked_of_the_adversaries():
    batch, _ = planted(37)
    model = tiny(CpaModel)
    with torch.no_grad():
        basal = model(**batch).basal
        known = model(**{**batch, "cell_line": torch.full_like(batch["cell_line"], LINES)})
        classes = torch.where(batch["dose"].isneginf(), DRUGS, batch["drug"])
        expected = torch.nn.functional.cross_entropy(model.adversaries["drug"](basal), classes)
    assert_close(known.adversary_loss, expected)
    # Fingerprints: a drug without a number is not asked for, the controls among the cells are.
    model = tiny(CpaModel, drug_encoder="fingerprint", fingerprint_size=BITS)
    batch = {**batch, "fingerprint": torch.rand(37, BITS).round(), "cell_line": torch.full_like(batch["drug"], LINES)}
    controls = batch["dose"].isneginf()
    with torch.no_grad():
        found = model(**{**batch, "drug": torch.full_like(batch["drug"], -100)})
        scores = model.adversaries["drug"](found.basal[controls])
    expected = torch.nn.functional.cross_entropy(scores, torch.full((int(controls.sum()),), DRUGS))
    assert_close(found.adversary_loss, expected)


def trained(model: Any, batch: dict[str, torch.Tensor], steps: int, rate: float = 5e-3) -> Any:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
    for _ in range(steps):
        rows = torch.randint(0, len(batch["drug"]), (128,), generator=generator)
        optimizer.zero_grad()
        model(**{name: tensor[rows] for name, tensor in batch.items()}).loss.backward()
        optimizer.step()
    return model.eval()


def test_the_adversaries_take_the_drug_out_of_the_basal_state():
    """On planted effects, neighbours in the basal state tell the drug without the adversaries' gradient, not with it.

    Only then do controls under a drug come near the truth.
    """
    batch, effects = planted()
    treated = ~batch["dose"].isneginf()
    controls = first({name: tensor[~treated] for name, tensor in batch.items()}, 100)
    drug_known, errors = {}, {}
    for weight in (0.0, 0.3):
        model = trained(tiny(CpaModel, adversary_weight=weight, gradient_penalty=0, adversary_size=32), batch, 500)
        with torch.no_grad():
            basal = model(**batch).basal[treated].numpy()
            asked = {**controls, "dose": torch.zeros(100), "drug": torch.ones(100, dtype=torch.int64)}
            predicted = model(**asked).predictions
        drug = batch["drug"][treated].numpy()
        probe = KNeighborsClassifier(10).fit(basal[::2], drug[::2])
        drug_known[weight] = probe.score(basal[1::2], drug[1::2])
        errors[weight] = float((predicted - controls["expression"] - effects[1]).square().mean())
    assert drug_known[0.0] > 0.9
    assert drug_known[0.3] < 0.7  # of three drugs
    no_change = float(effects[1].square().mean())
    assert errors[0.3] < 0.5 * no_change
    assert errors[0.3] < 0.5 * errors[0.0]


# ---- cVAE


def test_the_divergence_is_that_of_gaussians():
    means, log_variances = torch.randn(5, 3), torch.randn(5, 3)
    of_each = kl_divergence(Normal(means, (0.5 * log_variances).exp()), Normal(0.0, 1.0))
    assert_close(divergence(means, log_variances), of_each.sum(dim=1))


def test_the_loss_is_the_bound_divided_by_the_genes():
    model, (batch, _) = tiny(CvaeModel, kl_weight=0.7), planted(17)
    with torch.no_grad():
        found = model(**batch)
    squares = (found.predictions - batch["labels"]).square().sum(dim=1)
    assert_close(found.loss, (0.5 * squares.mean() + 0.7 * found.kl_loss) / GENES)
    # Drawn while training, so that two passes differ; means otherwise.
    with torch.no_grad():
        assert_close(model(**batch).latent, found.latent)
        assert (model.train()(**batch).latent - found.latent).abs().max() > 1e-3


def test_a_control_is_encoded_as_one_and_decoded_under_the_drug():
    model, (batch, _) = tiny(CvaeModel), planted(17)
    inputs = {name: batch[name] for name in ("expression", "cell_line", "drug")}
    with torch.no_grad():
        asked = model(**inputs, dose=torch.ones(17), is_control=torch.ones(17, dtype=torch.bool))
        as_control, as_treated = (model(**inputs, dose=torch.full((17,), d)) for d in (NONE, 1.0))
    assert_close(asked.latent, as_control.latent)
    assert (asked.latent - as_treated.latent).abs().max() > 1e-3
    assert (asked.predictions - as_control.predictions).abs().max() > 1e-3


# ---- both


@pytest.mark.parametrize(("model_class", "encoder"), [(CpaModel, "fingerprint"), (CvaeModel, "id")])
def test_a_few_cells_are_learnt_by_heart_in_the_loop_of_every_method(tmp_path, model_class, encoder):
    batch, _ = planted(13)
    options = {"kl_weight": 0.01} if model_class is CvaeModel else {"adversary_weight": 0.0}
    if encoder == "fingerprint":
        bits = (torch.rand(DRUGS, BITS, generator=torch.Generator().manual_seed(0)) < 0.5).float()
        batch["fingerprint"] = bits[batch["drug"]]
    model = tiny(model_class, drug_encoder=encoder, fingerprint_size=BITS, hidden_size=64, **options)
    examples = [{name: tensor[i] for name, tensor in batch.items()} for i in range(13)]
    config = LoopConfig(
        output=str(tmp_path), max_steps=120, batch_size=13, learning_rate=1e-2, warmup_steps=0, weight_decay=0
    )

    def collate(rows, keys):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    train_in_loop(model, examples, np.ones(13, int), collate, config, Accelerator(cpu=True))
    assert list(read_metrics(tmp_path / "metrics.jsonl"))  # logged like every other method
    with torch.no_grad():
        error = (model.eval()(**batch).predictions - batch["labels"]).square().mean()
    assert error < 0.05 * batch["labels"].var()


@pytest.mark.parametrize("model_class", [CpaModel, CvaeModel])
def test_every_parameter_gets_a_gradient(model_class):
    batch, _ = planted(61)
    model = tiny(model_class).train()
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("model_class", [CpaModel, CvaeModel])
def test_wrong_input_is_refused(model_class):
    model, (batch, _) = tiny(model_class), planted(5)
    with pytest.raises(ValueError, match="29 genes"):
        model(**{**batch, "expression": torch.zeros(5, 7)})
    with pytest.raises(ValueError, match="labels shaped"):
        model(**{**batch, "labels": torch.zeros(5, 7)})
    with pytest.raises(ValueError, match="needs drug="):
        model(batch["expression"], batch["cell_line"], batch["dose"])
    model = tiny(model_class, drug_encoder="fingerprint", fingerprint_size=BITS)
    with pytest.raises(ValueError, match=r"\(n, 11\); found \(5, 7\)"):
        model(batch["expression"], batch["cell_line"], batch["dose"], fingerprint=torch.zeros(5, 7))
    config_class = type(model.config)
    with pytest.raises(Exception, match="needs n_drugs"):
        config_class(n_genes=7)
    with pytest.raises(ValueError, match="did you mean 'latent_size'"):
        config_class(n_drugs=3, latentsize=7)
    with pytest.raises(Exception, match="hidden_size of 1 or more"):
        config_class(n_drugs=3, hidden_size=0)
    with pytest.raises(Exception, match="dropout from 0"):
        config_class(n_drugs=3, dropout=1)


@pytest.mark.parametrize(("model_type", "module"), [("cpa", configuration_cpa), ("cvae", configuration_cvae)])
def test_auto_map_names_what_is_registered(model_type, module):
    method = METHODS[model_type]
    registered = {**method.models, "AutoConfig": method.config}
    assert {auto: path.partition(".")[2] for auto, path in module.AUTO_MAP.items()} == registered
