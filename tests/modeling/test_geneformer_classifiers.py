"""Classifiers of cells and genes: padding, packing, losses, checkpoints in and out of BERT."""

import json
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
)

from cellglot import (
    GeneformerConfig,
    GeneformerForMaskedLM,
    GeneformerForMultiTaskSequenceClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerModel,
)

from .test_geneformer import CU_SEQLENS, LENGTHS, packed, tiny_batch, tiny_config

TASKS = {"cell type": ["B", "NK", "T"], "drug.dose": ["low", "high"]}
BERT = {
    GeneformerModel: BertModel,
    GeneformerForMaskedLM: BertForMaskedLM,
    GeneformerForSequenceClassification: BertForSequenceClassification,
    GeneformerForTokenClassification: BertForTokenClassification,
}


def make(model_class, **options):
    torch.manual_seed(0)
    return model_class(tiny_config(initializer_range=0.2, **options)).eval()


def cell_classifier(pooling, **options):
    return make(GeneformerForSequenceClassification, num_labels=5, classifier_pooling=pooling, **options)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_and_packing_do_not_change_a_cell_s_class(pooling):
    ids, mask, _ = tiny_batch()
    several = make(GeneformerForMultiTaskSequenceClassification, tasks=TASKS, classifier_pooling=pooling)
    for model in (cell_classifier(pooling), several):
        with torch.no_grad():
            alone = [model(ids[i : i + 1, :n]).logits for i, n in enumerate(LENGTHS)]
            for logits in (model(ids, mask).logits, model(packed(ids), cu_seqlens=CU_SEQLENS).logits):
                for i, one in enumerate(alone):
                    # 1e-5: float32 sums in another order
                    for a, b in zip(*((x,) if torch.is_tensor(x) else x for x in (logits, one)), strict=True):
                        assert_close(a[i : i + 1], b, atol=1e-5, rtol=1e-5)


def test_mean_pooling_is_the_mean_over_real_tokens():
    model, (ids, mask, _) = cell_classifier("mean"), tiny_batch()
    with torch.no_grad():
        x = model.bert(ids, mask).last_hidden_state
        expected = torch.stack([model.classifier(row[:n].mean(dim=0)) for row, n in zip(x, LENGTHS, strict=True)])
        assert_close(model(ids, mask).logits, expected, atol=1e-5, rtol=1e-5)


def test_class_weights_and_unlabelled_items():
    ids, mask, _ = tiny_batch()
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1])
    model, labels = cell_classifier("first"), torch.tensor([1, -100, 3])
    output = model(ids, mask, labels=labels, class_weights=weights)
    each = cross_entropy(output.logits, labels.clamp(min=0), reduction="none")
    assert_close(output.loss, (2.0 * each[0] + 3.0 * each[2]) / 2)
    genes = make(GeneformerForTokenClassification, num_labels=2)
    gene_labels = torch.where(mask.bool() & (ids % 3 == 0), ids % 2, -100)
    output = genes(ids, mask, labels=gene_labels)
    chosen = gene_labels != -100
    assert_close(output.loss, cross_entropy(output.logits[chosen], gene_labels[chosen]))


def test_a_batch_cut_in_two_gives_the_same_gradient():
    ids, mask, _ = tiny_batch()
    labels, weights = torch.tensor([4, 0, 2]), torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1])
    gradients = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        model = cell_classifier("mean")
        for part in parts:
            model(
                ids[part], mask[part], labels=labels[part], class_weights=weights, num_items_in_batch=3
            ).loss.backward()
        gradients.append(model.bert.embeddings.word_embeddings.weight.grad)
    assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_multi_task_loss_is_the_weighted_mean_over_tasks_and_cells():
    weights = {"drug.dose": 3.0}
    model = make(GeneformerForMultiTaskSequenceClassification, tasks=TASKS, task_weights=weights)
    ids, mask, _ = tiny_batch()
    labels = torch.tensor([[2, 1], [-100, 0], [0, -100]])
    class_weights = torch.tensor([[1.0, 1.0, 5.0], [0.5, 1.5, 99.0]])
    output = model(ids, mask, labels=labels, class_weights=class_weights)
    assert list(model.config.tasks or {}) == ["cell type", "drug.dose"]
    cell_type, dose = output.logits
    assert cell_type.shape == (3, 3)
    assert dose.shape == (3, 2)
    of_type = cross_entropy(
        cell_type[[0, 2]], torch.tensor([2, 0]), weight=torch.tensor([1.0, 1.0, 5.0]), reduction="sum"
    )
    of_dose = cross_entropy(dose[:2], torch.tensor([1, 0]), weight=torch.tensor([0.5, 1.5]), reduction="sum")
    assert_close(output.loss, (of_type + 3 * of_dose) / 4)
    with pytest.raises(ValueError, match="one column a task"):
        model(ids, mask, labels=labels[:, :1])


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (GeneformerForSequenceClassification, {"num_labels": 3}),
        (GeneformerForSequenceClassification, {"num_labels": 3, "classifier_pooling": "mean"}),
        (GeneformerForTokenClassification, {"num_labels": 3}),
        (GeneformerForMultiTaskSequenceClassification, {"tasks": {"a": ["x", "y", "z"], "b": ["u", "v", "w"]}}),
    ],
)
def test_every_parameter_gets_a_gradient_and_few_cells_are_learned_by_heart(model_class, options):
    torch.manual_seed(0)
    model = model_class(tiny_config(**options)).train()
    ids, mask, _ = tiny_batch()
    labels = torch.tensor([0, 1, 2])
    if model_class is GeneformerForTokenClassification:
        labels = torch.where(mask.bool(), ids % 3, -100)
    elif model_class is GeneformerForMultiTaskSequenceClassification:
        labels = torch.stack([labels, labels.flip(0)], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        loss = model(ids, mask, labels=labels).loss
        loss.backward()
        if step == 0:
            assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.05


@pytest.mark.parametrize("model_class", BERT)
def test_export_to_bert_and_back_is_the_same_model(model_class, tmp_path):
    model = make(model_class, id2label={0: "B", 1: "NK", 2: "T"})
    model.export_to_bert(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["architectures"] == [BERT[model_class].__name__]
    assert "auto_map" not in config
    ids, mask, _ = tiny_batch()
    loading = {"add_pooling_layer": False} if model_class is GeneformerModel else {}
    bert, info = BERT[model_class].from_pretrained(tmp_path / "bert", output_loading_info=True, **loading)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    back = model_class.from_pretrained(tmp_path / "bert")
    with torch.no_grad():
        expected = model(ids, mask)[0][mask.bool()] if model(ids, mask)[0].ndim == 3 else model(ids, mask)[0]
        for other in (bert, back):
            found = other.eval()(input_ids=ids, attention_mask=mask)[0]
            # Bit for bit: the same operations in the same order
            assert torch.equal(found[mask.bool()] if found.ndim == 3 else found, expected)
    assert back.config.id2label == model.config.id2label
    with pytest.raises(FileExistsError, match="not empty"):
        model.export_to_bert(tmp_path / "bert")


def test_tasks_keep_their_classifiers_whatever_order_they_are_given_in(tmp_path):
    make(GeneformerForMaskedLM).save_pretrained(tmp_path / "pretrained")
    tasks = {"z": ["1", "2", "3"], "a": ["x", "y"]}
    model = GeneformerForMultiTaskSequenceClassification.from_pretrained(tmp_path / "pretrained", tasks=tasks).eval()
    model.save_pretrained(tmp_path / "model")
    back = GeneformerForMultiTaskSequenceClassification.from_pretrained(tmp_path / "model")
    ids, mask, _ = tiny_batch()
    with torch.no_grad():
        for a, b in zip(model(ids, mask).logits, back(ids, mask).logits, strict=True):
            assert torch.equal(a, b)


def test_a_packed_batch_with_an_empty_cell_is_refused():
    ids, _, _ = tiny_batch()
    with pytest.raises(ValueError, match="without empty cells"):
        cell_classifier("mean")(packed(ids), cu_seqlens=torch.tensor([0, 13, 13, sum(LENGTHS)]))


def test_models_without_a_counterpart_in_bert_say_so(tmp_path):
    for model in (cell_classifier("mean"), make(GeneformerForMultiTaskSequenceClassification, tasks=TASKS)):
        with pytest.raises(TypeError, match="BERT has no counterpart"):
            model.export_to_bert(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_original_s_classification_checkpoints_load_as_they_are(tmp_path):
    """As its `Classifier` writes them: BertForSequenceClassification and BertForTokenClassification."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = BertConfig(
        vocab_size=101,
        max_position_embeddings=17,
        hidden_act="relu",
        initializer_range=0.2,
        id2label={0: "dosage-sensitive", 1: "insensitive"},
        **sizes,
    )
    ids, mask, _ = tiny_batch()
    for bert_class, ours in (
        (BertForSequenceClassification, GeneformerForSequenceClassification),
        (BertForTokenClassification, GeneformerForTokenClassification),
    ):
        bert = bert_class(config).eval()
        bert.save_pretrained(tmp_path / bert_class.__name__)
        model = ours.from_pretrained(tmp_path / bert_class.__name__)
        assert model.config.id2label[0] == "dosage-sensitive"
        with torch.no_grad():
            a, b = (m(input_ids=ids, attention_mask=mask).logits for m in (model, bert))
        assert torch.equal(*(x[mask.bool()] if x.ndim == 3 else x for x in (a, b)))


def test_a_classifier_starts_from_a_pre_trained_encoder(tmp_path):
    pretrained = make(GeneformerForMaskedLM)
    pretrained.save_pretrained(tmp_path)
    for model_class, options in (
        (GeneformerForSequenceClassification, {"num_labels": 3}),
        (GeneformerForTokenClassification, {"num_labels": 3}),
        (GeneformerForMultiTaskSequenceClassification, {"tasks": TASKS}),
    ):
        model, info = model_class.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert all("classifier" in key or "pooler" in key for key in info["missing_keys"])
        assert not info["unexpected_keys"]
        for name, tensor in pretrained.bert.state_dict().items():
            assert torch.equal(model.bert.state_dict()[name], tensor)


def test_checkpoints_of_another_architecture_are_refused(tmp_path):
    GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10, bos_token_id=0, eos_token_id=0)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(ValueError, match=r"holds a 'gpt2' model; expected 'geneformer'"):
        GeneformerModel.from_pretrained(tmp_path / "gpt2")
    # A configuration that promises more layers than there are weights
    make(GeneformerForMaskedLM).save_pretrained(tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 16 weights of this Geneformer, e\.g\. 'bert\.encoder\.layer\.2"):
        GeneformerForSequenceClassification.from_pretrained(tmp_path / "short", num_labels=3)


def test_configurations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"Expected config\.tasks"):
        GeneformerForMultiTaskSequenceClassification(tiny_config())
    refused: list[tuple[dict[str, Any], str]] = [
        ({"tasks": {"a": ["x"]}}, "two different labels"),
        ({"tasks": TASKS, "task_weights": {"cell": 1.0}}, "task_weights names"),
        ({"classifier_pooling": "max"}, "classifier_pooling"),
    ]
    for options, message in refused:
        with pytest.raises(Exception, match=message):
            GeneformerConfig(**options)
