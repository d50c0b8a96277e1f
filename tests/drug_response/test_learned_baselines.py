"""CPA, CPA_transfer and cVAE as baselines: what they are fed, and what they learn of planted responses."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cellglot.drug_response.data import ResponseData
from cellglot.drug_response.learned_baselines import AutoencoderBaseline

from .test_baselines import asked, wells

SIZES = {"latent_size": 8, "hidden_size": 32, "num_hidden_layers": 2}
LOOP = {"epochs": 150, "batch_size": 32, "learning_rate": 5e-3, "cpu_threads": 1}


def plain(data: ResponseData) -> ResponseData:
    """One plate, whose offset no model is told."""
    rows = data.is_control | (data.obs["plate"].to_numpy() == "P")
    return replace(data.select(rows & (data.obs["plate"].to_numpy() == "P")), pair_by=("cell_line",))


@pytest.mark.parametrize(
    ("model_type", "name", "settings", "epochs"),
    [("cpa", "CPA", {"gradient_penalty": 0}, 300), ("cvae", "cVAE", {}, 150)],
)
def test_drugs_effects_are_learnt_and_given_to_controls(model_type, name, settings, epochs):
    data, effect = wells(replicates=12, n_controls=12)
    data = plain(data)
    options = {"settings": {**SIZES, **settings}, "loop": {**LOOP, "epochs": epochs, "batch_size": 128}}
    fitted = AutoencoderBaseline(model_type, drug_encoder="id", **options).fit(data)
    assert fitted.name == name
    assert fitted.seconds_per_epoch > 0
    controls = data.expression[data.is_control & (data.cell_line == "A")]
    changes = {
        drug: (fitted.predict(controls, asked([drug] * len(controls), "A")) - controls).mean(axis=0) for drug in effect
    }
    # Of 108 profiles, effects are known roughly.
    table = np.array([[np.corrcoef(changes[a], effect[b])[0, 1] for b in effect] for a in effect])
    own, others = np.diag(table).mean(), table[~np.eye(len(table), dtype=bool)].mean()
    assert own > 0.5
    assert others < 0.2
    with pytest.raises(ValueError, match="drugs are unknown"):
        fitted.predict(controls[:1], asked(["new"], "A"))


@pytest.mark.parametrize("encoder", ["id", "fingerprint"])
def test_every_profile_is_fed_with_its_own_condition_and_controls_with_none(encoder):
    data, _ = wells()
    fitted = AutoencoderBaseline("cpa", drug_encoder=encoder, settings=SIZES, loop={**LOOP, "epochs": 1}).fit(data)
    inputs = fitted._inputs(data)
    treated = ~data.is_control
    torch.testing.assert_close(inputs["labels"], inputs["expression"], rtol=0, atol=0)
    assert (inputs["dose"][torch.from_numpy(data.is_control)] == -torch.inf).all()
    assert inputs["dose"][torch.from_numpy(treated)].eq(1).all()  # log10 of 10 uM
    drugs = [fitted.extractor.drugs[i] for i in inputs["drug"][torch.from_numpy(treated)]]
    assert drugs == data.drug[treated].tolist()
    assert [fitted.extractor.cell_lines[i] for i in inputs["cell_line"]] == data.cell_line.tolist()
    if encoder == "fingerprint":
        assert (inputs["fingerprint"].sum(dim=1) > 0).numpy().tolist() == treated.tolist()
        # A drug that was never trained on, by its structure
        fitted.extractor.smiles["octanol"] = "CCCCCCCCO"
        assert fitted.predict(data.expression[:1], asked(["octanol"], "A")).shape == (1, 17)


def test_transfer_brings_weights_drugs_and_lines_along():
    data, _ = wells(lines=("A",))
    other, _ = wells(lines=("B",), seed=3)
    # Other genes in another order, some of them missing
    columns = np.arange(16)[::-1]
    genes = pd.DataFrame(index=other.genes.index[columns])
    genes["gene_symbol"] = genes.index
    other = replace(other, expression=other.expression[:, columns], genes=genes)
    data = replace(data, genes=data.genes.assign(gene_symbol=data.genes.index))
    train = data.select(data.drug != "toluene")
    options = {"drug_encoder": "id", "settings": SIZES, "loop": {**LOOP, "epochs": 1}}
    alone = AutoencoderBaseline("cpa", **options).fit(train)
    fitted = AutoencoderBaseline("cpa", name="CPA_transfer", transfer=[other], **options).fit(train)
    assert fitted.name == "CPA_transfer"
    assert "toluene" in fitted.extractor.drugs
    assert "toluene" not in alone.extractor.drugs
    assert fitted.extractor.cell_lines == ["A", "B"]
    predicted = fitted.predict(train.expression[:2], asked(["toluene"] * 2, "A"))
    assert np.isfinite(predicted).all()


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="cpa, cvae, found 'vae'"):
        AutoencoderBaseline("vae")
