"""sci-Plex 3 from the published files to figures: builder, responses, an unseen drug, baselines, model, metrics."""

import numpy as np
import pytest
import scipy.sparse as sp
from accelerate import Accelerator

from cellglot.drug_response.baselines import baselines
from cellglot.drug_response.evaluation import predicted_responses, training_scores, treated_centroid
from cellglot.drug_response.learned_baselines import AutoencoderBaseline
from cellglot.drug_response.predict import ResponsePredictor
from cellglot.drug_response.reading import read_responses
from cellglot.drug_response.splits import hold_out_drugs
from cellglot.metrics.response import mean_figures, response_table
from cellglot.modeling.drug_response import DrugResponseConfig, DrugResponseForConditionalGeneration
from cellglot.tokenization.expression_features import ExpressionFeatureExtractor
from cellglot.train.drug_response_data import ResponsePairs
from cellglot.train.loop import LoopConfig, train

from ..datasets_scripts import test_sciplex3 as sciplex


def model_of(data, folder):
    """A tiny model, trained for some steps."""
    extractor = ExpressionFeatureExtractor.fit(data, drug_encoder="fingerprint", fingerprint_size=64)
    config = DrugResponseConfig.from_preset(
        "small",
        n_genes=extractor.n_genes,
        n_cell_lines=len(extractor.cell_lines),
        drug_encoder="fingerprint",
        fingerprint_size=64,
        hidden_size=16,
    )
    examples = ResponsePairs(data, extractor)
    model = DrugResponseForConditionalGeneration(config)
    options = LoopConfig(output=str(folder), max_steps=3, batch_size=8, warmup_steps=0, cpu_threads=1)
    train(model, examples, np.ones(len(examples), int), examples.collate, options, Accelerator(cpu=True))
    return ResponsePredictor(model, extractor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["geo", "chemcpa"])
def test_published_files_become_figures_of_an_unseen_drug(file_server, tmp_path, source):
    counts = sp.csr_matrix(np.random.default_rng(1).poisson(0.8, (sciplex.N_CELLS, sciplex.N_GENES)))
    if source == "geo":
        file_server.serve(sciplex.SciPlex3)
        sciplex.publish(file_server.folder, counts)
        path, layout = sciplex.build(tmp_path), None
    else:
        path, layout = tmp_path / "sciplex_complete.h5ad", "sciplex3_suite"
        sciplex.chemcpa(counts).write_h5ad(path)
    # Expression of chemCPA is logarithmic already.
    data = read_responses(path, layout=layout, counts=None if source == "geo" else False)
    assert len(data.drugs) == 3
    assert {str(line) for line in data.cell_line} == {"A549", "K562", "MCF7"}
    assert np.unique(data.dose).round(4).tolist() == [0, 0.01, 0.1, 1, 10]
    split = hold_out_drugs(data, 1)
    part = data.select(split.train)
    options = {"centroid_g": treated_centroid(part), "training_scores_g": training_scores(part)}
    cpa = AutoencoderBaseline(
        "cpa", settings={"hidden_size": 16}, loop={"epochs": 2, "batch_size": 32, "cpu_threads": 1}
    )
    fitted = [*(baseline.fit(part) for baseline in baselines()), cpa.fit(part), model_of(part, tmp_path / "run")]
    for predictor in fitted:
        table = response_table(predicted_responses(predictor, data, split), **options)
        assert len(table) == 3  # the drug in three lines
        figures = mean_figures(table)
        assert figures.pop("de_genes_from") == "training"
        assert np.isfinite(list(figures.values())).all(), predictor.name
