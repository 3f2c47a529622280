// The memory_attention tasks, compiled once per instruction set (see common/simd_task.h).
//
// Local part: flash attention with the queries of a block across the vector lanes, so that softmax is
// lane-wise. Memory part: every query has its own chunks, so there the head dim lies across the lanes, and
// chunks are read in place; so it does in the local part when queries are few.

#include "memory_attention/memory_attention_backward.h"
#include "memory_attention/memory_attention_few.h"
#include "memory_attention/memory_attention_forward.h"
