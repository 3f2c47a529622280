from . import ops as ops
from .api import memory_attention as memory_attention
