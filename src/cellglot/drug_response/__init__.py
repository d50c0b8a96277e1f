"""Responses to drugs: data and their splits, baselines, predictions.

data = read_responses("l1000.h5ad")
split = hold_out_drugs(data, 70)
predicted = predict_response(controls, model, extractor, drug="vorinostat", dose=10, dose_unit="uM")
"""

from .data import ResponseData
from .predict import ResponsePredictor, predict_response
from .reading import LAYOUTS, ResponseLayout, iter_responses, read_responses
from .splits import ResponseSplit, hold_out_drugs, hold_out_type_and_donor

__all__ = [
    "LAYOUTS",
    "ResponseData",
    "ResponseLayout",
    "ResponsePredictor",
    "ResponseSplit",
    "hold_out_drugs",
    "hold_out_type_and_donor",
    "iter_responses",
    "predict_response",
    "read_responses",
]
