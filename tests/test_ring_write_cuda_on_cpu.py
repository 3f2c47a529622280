"""The CUDA ring_write kernel, run on the CPU thread by thread (cuda_on_cpu.h): its logic, without a GPU.

What a GPU adds (blocks that run at once, memory order, its own conversions) is not seen.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from factories import new_ring, poison
from torch import Tensor

from longmem_kernels import Ring, ring_write
from longmem_kernels.ring_write.reference import ring_write_reference

ROOT = Path(__file__).parent.parent
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]  # in the order of `Scalar`
PREAMBLE = """
#include "common/scalar_convert.h"
#include "cuda_on_cpu.h"
inline uint16_t narrow_to_bfloat(float x) {
  const uint32_t bits = longmem::bits_of(x);
  return bits << 1 > 0xff000000u ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float widen_bfloat(uint16_t x) { return longmem::float_of(uint32_t(x) << 16); }
using __nv_bfloat16 = Float16<narrow_to_bfloat, widen_bfloat>;
using __half = Float16<longmem::float_to_half, longmem::half_to_float>;
"""
ENTRY = """
extern "C" const char* ring_write_on_cpu(void* store, void* centroid, void* tail, int64_t* cursor, float* scale,
    const void* key, const void* value, const int32_t* ring_index, const bool* mask,
    const int64_t* sizes, const int64_t* strides, int input, int storage, bool backwards) {
  longmem::RingWriteParams p{};
  p.store = store, p.centroid = centroid, p.tail = tail, p.cursor = cursor, p.scale = scale;
  p.key = key, p.value = value, p.ring_index = ring_index, p.mask = mask;
  p.R = sizes[0], p.G = sizes[1], p.M = sizes[2], p.C = sizes[3], p.D = sizes[4], p.B = sizes[5], p.T = sizes[6];
  for (int i = 0; i < 3; ++i) p.key_stride[i] = strides[i], p.value_stride[i] = strides[3 + i];
  for (int i = 0; i < 2; ++i) p.mask_stride[i] = strides[6 + i];
  cuda_on_cpu_backwards = backwards;
  return longmem::ring_write_cuda(p, longmem::Scalar(input), longmem::Scalar(storage), nullptr);
}
extern "C" int64_t launches() { return cuda_on_cpu_launches; }
extern "C" void threads_and_blocks(unsigned* result) { result[0] = blockDim.x, result[1] = gridDim.x; }
extern "C" bool would_be_wide(const void* key, const int64_t* sizes, const int64_t* stride) {
  longmem::RingWriteParams p{};
  p.key = p.value = key, p.G = sizes[0], p.D = sizes[1], p.B = sizes[2], p.T = sizes[3];
  for (int i = 0; i < 3; ++i) p.key_stride[i] = p.value_stride[i] = stride[i];
  return longmem::can_be_wide(p);
}
"""


def build(folder: Path, *, most_blocks: int | None = None) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("NOT TESTED: needs g++")
    source = (ROOT / "csrc/ring_write/ring_write_cuda.cu").read_text()
    source = re.sub(r"#include <cuda_\w+\.h>\n", "", source)
    launch = re.compile(r"(\w+<[\w, ]+>)<<<(\w+), (\w+), 0, \w+>>>\((.*?)\);")
    source, count = launch.subn(r"launch_on_cpu(\2, \3, [&] { \1(\4); });", source)
    assert count == 1 and "<<<" not in source, "one launch writes a ring"
    if most_blocks is not None:
        source, count = re.subn(r"kMaxBlocks = 65535", f"kMaxBlocks = {most_blocks}", source)
        assert count == 1
    (folder / "kernel.cpp").write_text(f"{PREAMBLE}{source}{ENTRY}")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    done = subprocess.run(
        [compiler, *flags, "kernel.cpp", "-o", "kernel.so"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "kernel.so"))
    library.ring_write_on_cpu.restype = ctypes.c_char_p
    library.launches.restype = ctypes.c_int64
    library.would_be_wide.restype = ctypes.c_bool
    return library


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="module")
def kernel_of_few_blocks(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """At most two blocks for each of two heads, so that they stride over the tiles."""
    return build(tmp_path_factory.mktemp("cuda_on_cpu_few_blocks"), most_blocks=4)


def write(
    kernel: ctypes.CDLL,
    ring: Ring,
    key: Tensor,
    value: Tensor,
    ring_index: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    backwards: bool = False,
) -> None:
    def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())

    sizes = [ring.rings, ring.kv_heads, ring.chunks, ring.chunk_size, ring.head_dim, key.shape[0], key.shape[2]]
    strides = [*key.stride()[:3], *value.stride()[:3], *(mask.stride() if mask is not None else (0, 0))]
    parts = (ring.store, ring.centroid, ring.tail, ring.cursor, ring.scale, key, value, ring_index, mask)
    before = kernel.launches()
    error = kernel.ring_write_on_cpu(
        *map(pointer, parts), (ctypes.c_int64 * 7)(*sizes), (ctypes.c_int64 * 8)(*strides),
        TYPES.index(key.dtype), TYPES.index(ring.store.dtype), backwards,
    )  # fmt: skip
    assert error is None, error
    assert kernel.launches() == before + 1


def assert_same(ours: Ring, wanted: Ring) -> None:
    """Bit for bit, NaN for NaN. The cursor too: between launches its upper bits count nothing."""
    assert torch.equal(ours.cursor, wanted.cursor)
    for name in ("store", "centroid", "scale"):
        got, want = getattr(ours, name), getattr(wanted, name)
        assert want is None or torch.equal(got.float().nan_to_num(7e7), want.float().nan_to_num(7e7)), name
    for ring in range(wanted.rings):
        written = int(wanted.cursor[ring]) % wanted.chunk_size
        assert torch.equal(
            ours.tail[ring, :, :, :written].nan_to_num(7e7), wanted.tail[ring, :, :, :written].nan_to_num(7e7)
        )


WHO_WRITES = pytest.mark.parametrize(
    ("rings", "rows", "ring_index"),
    [(2, 2, None), (1, 3, None), (3, 4, (2, 0, 2, 2)), (1, 1, None)],
    ids=["own", "shared", "indexed", "one"],
)


def check_sequence(
    kernel: ctypes.CDLL, ring_index: tuple[int, ...] | None, masked: bool, *, rings: int, rows: int, **sizes: object
) -> None:
    """Writes of several lengths, each with blocks and threads in either order, against the reference."""
    forwards, backwards, wanted = (poison(new_ring(rings=rings, **sizes)) for _ in range(3))  # type: ignore[arg-type]
    index = torch.tensor(ring_index, dtype=torch.int32) if ring_index else None
    for tokens in (7, 1, 2, 170, 3):  # 170: more than the ring holds, and several tiles
        shape = (rows, tokens, wanted.kv_heads, wanted.head_dim)
        key, value = (torch.randn(shape).transpose(1, 2) for _ in range(2))
        mask = torch.rand(tokens, rows).t() < 0.6 if masked else None
        ring_write(wanted, key, value, ring_index=index, mask=mask, impl="reference")
        for ours in (forwards, backwards):
            write(kernel, ours, key, value, index, mask, backwards=ours is backwards)
            assert_same(ours, wanted)
        if tokens == 7:  # from here on, rings are not in step
            for ring in (forwards, backwards, wanted):
                ring.reset(torch.arange(rings) == 1)


@pytest.mark.parametrize("masked", [False, True])
@WHO_WRITES
@pytest.mark.parametrize("chunk_size", [1, 3, 4])
@pytest.mark.parametrize("head_dim", [5, 16])  # elements one by one, and 16 bytes at once
def test_equals_the_reference_bit_for_bit(
    kernel: ctypes.CDLL,
    rings: int,
    rows: int,
    ring_index: tuple[int, ...] | None,
    masked: bool,
    chunk_size: int,
    head_dim: int,
) -> None:
    check_sequence(kernel, ring_index, masked, rings=rings, rows=rows, chunk_size=chunk_size, head_dim=head_dim)


@pytest.mark.parametrize("masked", [False, True])
@WHO_WRITES
@pytest.mark.parametrize("head_dim", [5, 16])
def test_quantised_chunks_equal_the_reference_bit_for_bit(
    kernel: ctypes.CDLL, rings: int, rows: int, ring_index: tuple[int, ...] | None, masked: bool, head_dim: int
) -> None:
    sizes = {"rings": rings, "rows": rows, "chunk_size": 3, "head_dim": head_dim, "dtype": torch.float8_e4m3fn}
    check_sequence(kernel, ring_index, masked, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
@WHO_WRITES
def test_blocks_stride_over_tiles(
    kernel_of_few_blocks: ctypes.CDLL, rings: int, rows: int, ring_index: tuple[int, ...] | None, masked: bool
) -> None:
    check_sequence(kernel_of_few_blocks, ring_index, masked, rings=rings, rows=rows, chunks=100, head_dim=8)
    grid = (ctypes.c_uint * 2)()
    write(kernel_of_few_blocks, new_ring(chunks=100), *torch.randn(2, 2, 2, 399, 8))
    kernel_of_few_blocks.threads_and_blocks(grid)
    assert grid[1] == 2 * 2  # two blocks for each of two rings, and seven tiles


@pytest.mark.parametrize("storage", TYPES)
@pytest.mark.parametrize("dtype", TYPES[:3])
@pytest.mark.parametrize("head_dim", [63, 64])
def test_every_pair_of_input_and_storage_dtype_rounds_alike(
    kernel: ctypes.CDLL, dtype: torch.dtype, storage: torch.dtype, head_dim: int
) -> None:
    ours, wanted = (new_ring(chunk_size=3, head_dim=head_dim, dtype=storage) for _ in range(2))
    spread = torch.logspace(-9, 6, head_dim)
    key, value = ((torch.randn(2, 2, 25, head_dim) * spread).to(dtype) for _ in range(2))
    key[0, 1, 7, 3], value[1, 0, 12, 2], key[1, 1, 20, 1] = torch.nan, torch.inf, -torch.inf
    write(kernel, ours, key, value)
    ring_write(wanted, key, value, impl="reference")
    assert_same(ours, wanted)


@pytest.mark.parametrize("head_dim", [8, 40, 96, 264])  # vectors that divide the lanes of a group, and that do not
@pytest.mark.parametrize("storage", [torch.float32, torch.float8_e4m3fn])
def test_lanes_cover_every_head_dim(kernel: ctypes.CDLL, head_dim: int, storage: torch.dtype) -> None:
    check_sequence(kernel, None, False, rings=2, rows=2, head_dim=head_dim, chunk_size=5, dtype=storage)


def test_a_row_of_many_masked_tokens_is_searched_by_all_threads(kernel: ctypes.CDLL) -> None:
    ours, wanted = (new_ring(rings=2, kv_heads=1, chunks=3000) for _ in range(2))
    key, mask = torch.randn(3, 1, 5003, 8), torch.rand(3, 5003) < 0.4
    index = torch.tensor([1, 0, 1], dtype=torch.int32)
    write(kernel, ours, key, key, index, mask)
    ring_write(wanted, key, key, ring_index=index, mask=mask, impl="reference")
    assert_same(ours, wanted)


def test_a_row_whose_ring_does_not_exist_is_dropped(kernel: ctypes.CDLL) -> None:
    ours, wanted = new_ring(), new_ring()
    key, value = torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    write(kernel, ours, key, value, torch.tensor([0, 7, -1], dtype=torch.int32), None)
    ring_write(wanted, key[:1], value[:1], ring_index=torch.tensor([0], dtype=torch.int32), impl="reference")
    assert_same(ours, wanted)


def test_one_token_takes_one_small_block_per_ring_and_head(kernel: ctypes.CDLL) -> None:
    grid = (ctypes.c_uint * 2)()
    ring = new_ring(rings=3, head_dim=64)
    write(kernel, ring, *torch.randn(2, 3, 2, 1, 64))
    kernel.threads_and_blocks(grid)
    assert list(grid) == [32, 3]


@pytest.mark.parametrize(
    ("head_dim", "stride", "shift", "wide"),
    [
        (64, (640, 64, 64), 0, True),
        (63, (640, 64, 64), 0, False),
        (64, (640, 64, 64), 1, False),
        (64, (640, 64, 65), 0, False),
        (64, (640, 65, 64), 0, True),  # the stride of a single head means nothing
    ],
)
def test_16_bytes_at_once_only_where_all_is_aligned(
    kernel: ctypes.CDLL, head_dim: int, stride: tuple[int, ...], shift: int, wide: bool
) -> None:
    sizes = (ctypes.c_int64 * 4)(1, head_dim, 2, 5)
    address = ctypes.c_void_p(4096 + 4 * shift)
    assert kernel.would_be_wide(address, sizes, (ctypes.c_int64 * 3)(*stride)) == wide


def test_what_cannot_be_launched_is_said_before_anything_changes(kernel: ctypes.CDLL) -> None:
    ring = new_ring(rings=1, kv_heads=1)
    key = torch.randn(1, 1, 1, 8).expand(1, 1, 2**30 + 1, 8)
    with pytest.raises(AssertionError, match="too many tokens"):
        write(kernel, ring, key, key)
    assert ring.cursor.tolist() == [0]


@pytest.mark.parametrize("cursor", [-(2**63), -7, 2**48 - 3, 2**48, 2**63 - 1])
@pytest.mark.parametrize("shared", [False, True])
def test_any_cursor_writes_inside_and_leaves_a_cursor(kernel: ctypes.CDLL, cursor: int, shared: bool) -> None:
    """Taken modulo 2^48, of which the reference makes the same. Without upper bits: with them, counting blocks would
    end at another one."""
    key, value = torch.randn(2, 2, 2, 9, 8)
    rings = [new_ring(), new_ring()]
    mask = torch.ones(2, 9, dtype=torch.bool) if shared else None
    index = torch.tensor([1, -4], dtype=torch.int32) if shared else None
    for ring in rings:
        ring.cursor.fill_(cursor % 2**48)
    write(kernel, rings[0], key, value, index, mask)
    ring_write_reference(rings[1], key, value, index, mask)
    for part in ("store", "centroid", "cursor"):
        assert torch.equal(getattr(rings[0], part), getattr(rings[1], part))
    assert all(0 <= end < 2**48 for end in rings[0].cursor.tolist())
    rings[0].cursor.fill_(cursor)
    for _ in range(3):
        write(kernel, rings[0], key, value, index, mask)


def test_more_tokens_in_a_chunk_than_a_tile_holds_are_refused(kernel: ctypes.CDLL) -> None:
    store, tail, key = torch.zeros(1, 1, 2, 2, 65, 8), torch.zeros(1, 1, 2, 65, 8), torch.zeros(1, 1, 70, 8)
    ring = Ring(store, torch.zeros(1, 1, 2, 8), tail, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(AssertionError, match="too many tokens in a chunk"):
        write(kernel, ring, key, key)
