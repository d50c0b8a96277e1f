"""What must hold of the drug response models: tokens, masks, tasks, conditions, decoders, the authors' variant."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from cellglot import (
    DrugResponseConfig,
    DrugResponseForConditionalGeneration,
    DrugResponseForPreTraining,
    DrugResponseModel,
)
from cellglot.modeling.drug_response.modeling_drug_response import masked_genes

# Primes, so that a swapped axis fails
PROFILES, GENES, DRUGS, LINES, BITS = 11, 17, 5, 3, 23
TASKS = ["mask", "cell_line", "drug", "dose"]
AXES = pytest.mark.parametrize("token_axis", ["genes", "profile"])


def tiny_config(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    counts = {"n_genes": GENES, "n_drugs": DRUGS, "n_cell_lines": LINES, "fingerprint_size": BITS}
    decoder = {"decoder_size": 13, "decoder_layers": 2, "tasks": TASKS, "token_axis": "genes"}
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "condition_dropout", "cell_line_dropout")
    # Larger initial weights than in practice, so that differences show
    plain = {"initializer_range": 0.2} | dict.fromkeys(rates, 0.0)
    return DrugResponseConfig(**{**counts, **sizes, **decoder, **plain, **options})


def tiny_model(cls: Any = DrugResponseForConditionalGeneration, **options) -> Any:
    torch.manual_seed(0)
    return cls(tiny_config(**options)).eval()


def tiny_batch(n=PROFILES, seed=0, drug_encoder="id"):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "expression": torch.randn(n, GENES, generator=generator),
        "cell_line": torch.arange(n) % LINES,
        "dose": torch.randn(n, generator=generator),
    }
    if drug_encoder == "id":
        return batch | {"drug": torch.arange(n) % DRUGS}
    return batch | {"fingerprint": (torch.rand(n, BITS, generator=generator) < 0.3).float()}


@AXES
def test_hidden_values_are_not_seen(token_axis):
    model = tiny_model(DrugResponseForPreTraining, token_axis=token_axis)
    x, masked = tiny_batch()["expression"], masked_genes(PROFILES, GENES, 0.4)
    other = torch.where(masked, 100.0, x)
    assert_close(model(x, masked).reconstructions, model(other, masked).reconstructions)
    assert not torch.allclose(model(x).reconstructions, model(other).reconstructions)


@pytest.mark.parametrize("ratio", [0.15, 0.8])
def test_the_same_number_of_genes_is_hidden_in_each_profile(ratio):
    masked = masked_genes(101, GENES, ratio)
    assert masked.sum(1).unique().tolist() == [round(ratio * GENES)]
    # Any gene may be.
    assert masked.any(0).all()


@AXES
def test_masked_loss_counts_only_masked_genes(token_axis):
    model = tiny_model(DrugResponseForPreTraining, token_axis=token_axis, tasks=["mask"])
    x, masked = tiny_batch()["expression"], masked_genes(PROFILES, GENES, 0.4)
    output = model(x, masked, labels=x)
    assert_close(output.loss, (output.reconstructions - x)[masked].square().mean())
    wrong_elsewhere = torch.where(masked, x, x + 50)
    assert_close(model(x, masked, labels=wrong_elsewhere).loss, output.loss)
    wrong_there = torch.where(masked, x + 50, x)
    assert model(x, masked, labels=wrong_there).loss > 100


def test_the_authors_loss_counts_all_genes():
    model = tiny_model(DrugResponseForPreTraining, mask_loss="all", tasks=["mask"])
    x, masked = tiny_batch()["expression"], masked_genes(PROFILES, GENES, 0.4)
    output = model(x, masked, labels=x)
    assert_close(output.loss, (output.reconstructions - x).square().mean())


@AXES
def test_four_tasks_are_summed_and_unknown_labels_do_not_count(token_axis):
    model = tiny_model(DrugResponseForPreTraining, token_axis=token_axis)
    batch, masked = tiny_batch(), masked_genes(PROFILES, GENES, 0.4)
    x, drug, dose = batch["expression"], batch["drug"].clone(), batch["dose"].clone()
    drug[::2], dose[::2] = -100, float("nan")
    output = model(x, masked, labels=x, cell_line=batch["cell_line"], drug=drug, dose=dose)
    cross_entropy = torch.nn.functional.cross_entropy
    assert_close(output.cell_line_loss, cross_entropy(output.cell_line_logits, batch["cell_line"]))
    assert_close(output.drug_loss, cross_entropy(output.drug_logits[1::2], drug[1::2]))
    assert_close(output.dose_loss, (output.doses - dose)[1::2].square().mean())
    parts = (output.mask_loss, output.cell_line_loss, output.drug_loss, output.dose_loss)
    assert_close(output.loss, sum(parts, torch.zeros(())))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_profiles_without_any_known_label_have_a_loss_of_zero():
    model = tiny_model(DrugResponseForPreTraining, tasks=["drug", "dose"])
    x = tiny_batch()["expression"]
    unknown = torch.full((PROFILES,), -100)
    assert float(model(x, drug=unknown, dose=torch.full((PROFILES,), float("nan"))).loss.detach()) == 0


def test_one_task_has_no_other_heads():
    output = tiny_model(DrugResponseForPreTraining, tasks=["mask"])(**{"expression": tiny_batch()["expression"]})
    assert output.drug_logits is None
    assert output.doses is None
    assert output.loss is None


@pytest.mark.parametrize(
    ("token_axis", "decoder", "drug_encoder"),
    [
        ("genes", "lstm", "id"),
        ("genes", "mlp", "fingerprint"),
        ("profile", "lstm", "fingerprint"),
        ("profile", "mlp", "id"),
    ],
)
def test_decoders_overfit_a_tiny_set(token_axis, decoder, drug_encoder):
    model = tiny_model(
        token_axis=token_axis, decoder=decoder, drug_encoder=drug_encoder, num_hidden_layers=1, initializer_range=0.02
    ).train()
    batch = tiny_batch(drug_encoder=drug_encoder)
    # The same control for all: only the conditions tell the answers apart.
    batch["expression"] = batch["expression"][:1].repeat(PROFILES, 1)
    labels = torch.randn(PROFILES, GENES, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(250):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01  # the variance of the labels is 1
    assert_close(model.eval()(**batch).predictions, labels, atol=0.5, rtol=0)


@AXES
def test_predictions_depend_on_control_drug_line_and_dose(token_axis):
    model, batch = tiny_model(token_axis=token_axis), tiny_batch()
    before = model(**batch).predictions
    for name, change in (
        ("expression", lambda x: x + 1),
        ("drug", lambda x: (x + 1) % DRUGS),
        ("cell_line", lambda x: (x + 1) % LINES),
        ("dose", lambda x: x + 1),
    ):
        after = model(**batch | {name: change(batch[name])}).predictions
        assert (before - after).abs().amax(1).min() > 1e-4, name


@AXES
def test_a_profile_does_not_depend_on_its_batch_unless_profiles_attend_to_each_other(token_axis):
    batch = tiny_batch()
    alone = {name: values[:3] for name, values in batch.items()}
    model = tiny_model(token_axis=token_axis)
    assert_close(model(**batch).predictions[:3], model(**alone).predictions, atol=1e-5, rtol=1e-4)
    if token_axis == "profile":
        across = tiny_model(token_axis=token_axis, attends_across_profiles=True)
        assert not torch.allclose(across(**batch).predictions[:3], across(**alone).predictions, atol=1e-3)


def test_an_lstm_runs_over_the_genes_and_an_mlp_does_not():
    # With no encoder layer between them, a gene reaches another's prediction through the LSTM only.
    x = tiny_batch()["expression"]
    for decoder, reached in (("lstm", True), ("mlp", False)):
        model = tiny_model(decoder=decoder, num_hidden_layers=0)
        changed = x.clone()
        changed[:, 4] += 3
        batch = tiny_batch()
        difference = model(**batch).predictions - model(**batch | {"expression": changed}).predictions
        assert bool((difference.abs()[:, [3, 5]] > 1e-5).all()) == reached
        assert (difference.abs()[:, 4] > 1e-5).all()


def test_a_change_is_added_to_what_enters_and_a_nonnegative_prediction_never_falls_below_zero():
    batch = tiny_batch()
    model = tiny_model(predicts="change")
    torch.nn.init.zeros_(model.decoder.output.weight)
    assert_close(model(**batch).predictions, batch["expression"])
    predictions = tiny_model(nonnegative=True)(**batch).predictions
    assert predictions.min() == 0
    assert predictions.max() > 0


def test_the_robust_loss_is_the_pseudo_huber_error_of_whole_profiles():
    batch, labels = tiny_batch(), torch.randn(PROFILES, GENES, generator=torch.Generator().manual_seed(1))
    labels[3] *= 20
    model = tiny_model(response_loss="robust", robust_width=0.7)
    output = model(**batch, labels=labels)
    squared = ((output.predictions - labels) ** 2).mean(1)
    assert_close(output.loss, (2 * 0.7 * ((0.7**2 + squared) ** 0.5 - 0.7)).mean())
    # A wide one is the squared error.
    wide = tiny_model(response_loss="robust", robust_width=1e3)(**batch, labels=labels).loss
    assert_close(wide, tiny_model()(**batch, labels=labels).loss, rtol=0.01, atol=0)


def test_the_authors_dose_multiplies_the_drug():
    model = tiny_model(dose_encoder="weight").conditions
    batch = tiny_batch()
    none, one, two = (
        model(batch["drug"], batch["cell_line"], torch.full((PROFILES,), dose)) for dose in (0.0, 1.0, 2.0)
    )
    assert_close(two - none, 2 * (one - none), atol=1e-5, rtol=1e-4)
    assert_close(none, model.cell_line(model.cell_lines(batch["cell_line"])))


def test_withheld_cell_lines_train_the_line_that_is_not_known():
    model = tiny_model(cell_line_dropout=0.5).train()
    torch.manual_seed(0)
    model(**tiny_batch(), labels=tiny_batch()["expression"]).loss.backward()
    assert model.conditions.cell_lines.weight.grad[LINES].abs().max() > 0
    unknown = tiny_batch() | {"cell_line": torch.full((PROFILES,), LINES)}
    assert model.eval()(**unknown).predictions.isfinite().all()


@AXES
@pytest.mark.parametrize("decoder", ["lstm", "mlp"])
def test_every_parameter_gets_a_gradient(token_axis, decoder):
    model = tiny_model(token_axis=token_axis, decoder=decoder, cell_line_dropout=0.3).train()
    model(**tiny_batch(), labels=torch.ones(PROFILES, GENES)).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


@AXES
def test_pretrained_encoders_go_on_in_the_next_stage_and_in_fine_tuning(token_axis, tmp_path):
    first = tiny_model(DrugResponseForPreTraining, token_axis=token_axis, tasks=["mask"], n_drugs=0)
    first.save_pretrained(tmp_path)
    x = tiny_batch()["expression"]
    expected = first(x).embeddings
    second = DrugResponseForPreTraining.from_pretrained(tmp_path, tasks=TASKS, n_drugs=DRUGS).eval()
    assert_close(second(x).embeddings, expected)
    assert_close(second(x).reconstructions, first(x).reconstructions)
    assert second(x).drug_logits.shape == (PROFILES, DRUGS)
    generation = DrugResponseForConditionalGeneration.from_pretrained(tmp_path, n_drugs=DRUGS).eval()
    assert_close(generation(**tiny_batch()).embeddings, expected)
    assert_close(DrugResponseModel.from_pretrained(tmp_path).eval()(x).embeddings, expected)


@AXES
def test_saved_models_come_back_the_same(token_axis, tmp_path):
    model = tiny_model(token_axis=token_axis)
    model.save_pretrained(tmp_path)
    again = DrugResponseForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert_close(again(**tiny_batch()).predictions, model(**tiny_batch()).predictions)


@AXES
def test_attention_implementations_and_checkpointing_agree(token_axis):
    batch = tiny_batch()
    model = tiny_model(token_axis=token_axis)
    expected = model(**batch).predictions
    model.set_attn_implementation("eager")
    assert_close(model(**batch, output_attentions=True).predictions, expected, atol=1e-5, rtol=1e-4)
    model.train().activation_checkpointing_enable()
    assert_close(model(**batch).predictions, expected, atol=1e-5, rtol=1e-4)


@AXES
def test_bfloat16_and_no_profiles_work(token_axis):
    model = tiny_model(token_axis=token_axis).to(torch.bfloat16)
    batch = tiny_batch()
    output = model(**batch, labels=batch["expression"])
    assert output.predictions.dtype == torch.float32
    assert output.loss.isfinite()
    empty = {name: values[:0] for name, values in batch.items()}
    if token_axis == "profile":
        assert tiny_model(token_axis=token_axis).model(empty["expression"]).embeddings.shape == (0, 32)


def test_a_seed_decides_everything():
    outputs = []
    for _ in range(2):
        model = tiny_model(DrugResponseForPreTraining, hidden_dropout_prob=0.3).train()
        torch.manual_seed(5)
        outputs.append(model(tiny_batch()["expression"]).reconstructions)
    assert_close(*outputs)


def test_presets_have_their_sizes():
    literal = DrugResponseConfig.from_preset("literal", n_drugs=2)
    assert (literal.token_axis, literal.training_input, literal.hidden_size) == ("profile", "self", 1024)
    assert literal.nonnegative
    assert DrugResponseConfig.from_preset("base").num_hidden_layers == 12
    with pytest.raises(ValueError, match="preset among base, literal, small, found 'tiny'"):
        DrugResponseConfig.from_preset("tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30}, "multiple of"),
        ({"tasks": ["mask", "mask"]}, "each once"),
        ({"tasks": ["dosage"]}, "Expected tasks among"),
        ({"n_drugs": 0}, "Task 'drug' needs n_drugs"),
        ({"mask_ratio": 1.0}, "mask_ratio between 0 and 1"),
        ({"attends_across_profiles": True}, 'needs token_axis="profile"'),
        ({"nonnegative": True, "predicts": "change"}, "nonnegative cuts off"),
        ({"decoder_sizes": 3}, "did you mean 'decoder_size'"),
    ],
)
def test_configurations_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**options)


def test_inputs_that_do_not_fit_are_refused():
    model, batch = tiny_model(), tiny_batch()
    with pytest.raises(ValueError, match=r"Expected expression \(profiles, 17 genes\), found \(11, 16\)"):
        model(**batch | {"expression": batch["expression"][:, 1:]})
    with pytest.raises(ValueError, match="Expected labels shaped as expression"):
        model(**batch, labels=torch.zeros(3, GENES))
    with pytest.raises(ValueError, match='drug_encoder="id" and needs drug='):
        model(**tiny_batch(drug_encoder="fingerprint"))
    by_structure = tiny_model(drug_encoder="fingerprint")
    with pytest.raises(ValueError, match="fingerprints of 23 bits, found 22"):
        by_structure(**tiny_batch(), fingerprint=torch.zeros(PROFILES, 22))
    with pytest.raises(ValueError, match="needs n_drugs"):
        tiny_model(n_drugs=0, tasks=["mask"])
