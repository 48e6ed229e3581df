"""Asking a model: cache, engine and sampler. Ids in, ids out; no text in this room."""

from l4cli.inference.cache import Cache, CacheBatch
from l4cli.inference.engine import PREFILL_CHUNK, Engine, Event, Request, RoutingRecord
from l4cli.inference.kept import KV_DTYPES, CacheOptions
from l4cli.inference.packing import pack_weights
from l4cli.inference.sampler import Sampler, SamplingOptions
from l4cli.inference.sparse import Recall

__all__ = [
    "KV_DTYPES",
    "PREFILL_CHUNK",
    "Cache",
    "CacheBatch",
    "CacheOptions",
    "Engine",
    "Event",
    "Recall",
    "Request",
    "RoutingRecord",
    "Sampler",
    "SamplingOptions",
    "pack_weights",
]
