"""Checkpoints: Hugging Face folders in and out, run folders, what a resumed run needs.

in: models, tokenizer files, training state; out: folders that are whole or not there
"""

from l4cli.checkpoint.headers import read_header
from l4cli.checkpoint.manifest import Problem, verify_manifest, write_manifest
from l4cli.checkpoint.quantization_plan import QuantizationPlan, plan_quantization
from l4cli.checkpoint.quantized import quantized_names, read_quantized
from l4cli.checkpoint.quantizing import (
    LayerReport,
    add_to_report,
    plan_facts,
    quantize_checkpoint,
    require_new,
)
from l4cli.checkpoint.reader import load_config, load_model, load_weights, require_weights_fit
from l4cli.checkpoint.run_folder import RunFolder
from l4cli.checkpoint.stored import StoredWeights, open_weights, resolve_checkpoint
from l4cli.checkpoint.summary import describe_checkpoint, describe_run, describe_weights_file
from l4cli.checkpoint.training_state import (
    load_training_state,
    read_state_json,
    save_training_state,
)
from l4cli.checkpoint.writer import save_model

__all__ = [
    "LayerReport",
    "Problem",
    "QuantizationPlan",
    "RunFolder",
    "StoredWeights",
    "add_to_report",
    "describe_checkpoint",
    "describe_run",
    "describe_weights_file",
    "load_config",
    "load_model",
    "load_training_state",
    "load_weights",
    "open_weights",
    "plan_facts",
    "plan_quantization",
    "quantize_checkpoint",
    "quantized_names",
    "read_header",
    "read_quantized",
    "read_state_json",
    "require_new",
    "require_weights_fit",
    "resolve_checkpoint",
    "save_model",
    "save_training_state",
    "verify_manifest",
    "write_manifest",
]
