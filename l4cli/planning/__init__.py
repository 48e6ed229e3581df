"""What a job needs before it starts: operations, bytes, time, and what this machine has.

in: a config and options; out: figures, or a refusal before anything is allocated
"""

from l4cli.planning.flops import (
    active_matmul_parameters,
    flops_per_token,
    mean_attended,
    vision_flops_per_tile,
)
from l4cli.planning.gpus import GPUS, QUOTED
from l4cli.planning.machine import BandwidthProbe, available_memory, gemm_rate
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
from l4cli.planning.roofline import STORAGES, Storage, ceiling, step_cost
from l4cli.planning.summary import describe_config

__all__ = [
    "GPUS",
    "QUOTED",
    "STORAGES",
    "TYPICAL_MFU",
    "BandwidthProbe",
    "Machine",
    "ReadingPlan",
    "Storage",
    "TrainingPlan",
    "active_matmul_parameters",
    "available_memory",
    "ceiling",
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
    "step_cost",
    "this_machine",
    "training_bytes",
    "vision_flops_per_tile",
]
