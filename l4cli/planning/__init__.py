"""What a job needs before it starts: operations, bytes, time, and what this machine has.

in: a config and options; out: figures, or a refusal before anything is allocated
"""

from l4cli.planning.flops import (
    active_matmul_parameters,
    flops_per_token,
    mean_attended,
    vision_flops_per_tile,
)
from l4cli.planning.machine import available_memory, gemm_rate
from l4cli.planning.memory import inference_bytes, training_bytes
from l4cli.planning.plan import (
    TYPICAL_MFU,
    TrainingPlan,
    largest_fitting_preset,
    plan_training,
    require_training_fits,
)
from l4cli.planning.reading import (
    Machine,
    ReadingPlan,
    parse_gpus,
    plan_reading,
    this_machine,
)
from l4cli.planning.summary import describe_config

__all__ = [
    "TYPICAL_MFU",
    "Machine",
    "ReadingPlan",
    "TrainingPlan",
    "active_matmul_parameters",
    "available_memory",
    "describe_config",
    "flops_per_token",
    "gemm_rate",
    "inference_bytes",
    "largest_fitting_preset",
    "mean_attended",
    "parse_gpus",
    "plan_reading",
    "plan_training",
    "require_training_fits",
    "this_machine",
    "training_bytes",
    "vision_flops_per_tile",
]
