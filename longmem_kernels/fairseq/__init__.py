"""The two classes of the published LongMem (a fairseq fork) that touch memory, on this package's kernels.

They take the place of the originals by changing two imports, need neither fairseq nor FAISS, and run on CPUs too:

    from longmem_kernels.fairseq import External_Memory, JointMultiheadAttentionWeightedSum

Names, layouts (time first), rules and parameter names are those of the published code. Together they take the fused
path, in which no gathered copy of memory exists; each also works beside the other's original.
"""

from .attention import JointMultiheadAttentionWeightedSum
from .memory import External_Memory, Retrieved

__all__ = ["External_Memory", "JointMultiheadAttentionWeightedSum", "Retrieved"]
