"""Asking a model: cache, engine and sampler. Ids in, ids out; no text in this room."""

from l4cli.inference.cache import Cache, CacheBatch
from l4cli.inference.drafts import LookupDrafter, ModelDrafter
from l4cli.inference.engine import PREFILL_CHUNK, Engine
from l4cli.inference.kept import KV_DTYPES, CacheOptions
from l4cli.inference.offload import offload_experts, open_offloaded
from l4cli.inference.packing import pack_weights
from l4cli.inference.requests import Event, Request, RoutingRecord
from l4cli.inference.sampler import Sampler, SamplingOptions
from l4cli.inference.sparse import Recall
from l4cli.inference.speculative import Speculation, step_cost

__all__ = [
    "KV_DTYPES",
    "PREFILL_CHUNK",
    "Cache",
    "CacheBatch",
    "CacheOptions",
    "Engine",
    "Event",
    "LookupDrafter",
    "ModelDrafter",
    "Recall",
    "Request",
    "RoutingRecord",
    "Sampler",
    "SamplingOptions",
    "Speculation",
    "offload_experts",
    "open_offloaded",
    "pack_weights",
    "step_cost",
]
