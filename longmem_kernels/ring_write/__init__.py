from . import ops as ops
from .api import ring_write as ring_write
