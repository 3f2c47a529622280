from . import ops as ops
from .api import chunk_topk as chunk_topk
