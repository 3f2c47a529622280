"""The CUDA ring_write kernels, run on the CPU thread by thread (cuda_on_cpu.h): their logic, without a GPU.

float32 only: CUDA's 16-bit types need CUDA's headers. What a GPU adds (memory order, occupancy, launches) is not seen.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from factories import new_ring
from torch import Tensor

from longmem_kernels import Ring, ring_write

ROOT = Path(__file__).parent.parent
ENTRY = """
extern "C" const char* ring_write_on_cpu(void* store, void* centroid, void* tail, int64_t* cursor, const void* key,
    const void* value, const int32_t* ring_index, const bool* mask, const int64_t* sizes, const int64_t* strides) {
  longmem::RingWriteParams p{};
  p.store = store, p.centroid = centroid, p.tail = tail, p.cursor = cursor, p.key = key, p.value = value;
  p.ring_index = ring_index, p.mask = mask;
  p.R = sizes[0], p.G = sizes[1], p.M = sizes[2], p.C = sizes[3], p.D = sizes[4], p.B = sizes[5], p.T = sizes[6];
  for (int i = 0; i < 3; ++i) p.key_stride[i] = strides[i], p.value_stride[i] = strides[3 + i];
  for (int i = 0; i < 2; ++i) p.mask_stride[i] = strides[6 + i];
  std::vector<char> workspace(longmem::ring_write_cuda_workspace(p), 0x7f);
  return longmem::ring_write_cuda(p, longmem::Scalar::f32, longmem::Scalar::f32, workspace.data(), nullptr);
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = (ROOT / "csrc/ring_write/ring_write_cuda.cu").read_text()
    source = re.sub(r"#include <cuda_\w+\.h>\n", "", source)
    source = re.sub(r"case Scalar::b?f16:\s*(return )?launch<.*?;(\s*break;)?", "", source, flags=re.S)
    launches = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(\w+), (\w+), 0, \w+>>>\((.*?)\);")
    source, count = launches.subn(r"launch_on_cpu(\2, \3, [&] { \1(\4); });", source)
    assert count == 2
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    # Threads of a block are far more than cores: fewer make the plan kernel quicker, and its loops longer.
    source = source.replace("kPlanThreads = 1024", "kPlanThreads = 64").replace(
        "kWriteThreads = 128", "kWriteThreads = 32"
    )
    (folder / "kernel.cpp").write_text(f'#include "cuda_on_cpu.h"\n{source}\n{ENTRY}')
    flags = ["-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-w", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    done = subprocess.run(
        [compiler, *flags, "kernel.cpp", "-o", "kernel.so"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "kernel.so"))
    library.ring_write_on_cpu.restype = ctypes.c_char_p
    return library


def write(
    kernel: ctypes.CDLL, ring: Ring, key: Tensor, value: Tensor, ring_index: Tensor | None, mask: Tensor | None
) -> None:
    def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())

    sizes = [ring.rings, ring.kv_heads, ring.chunks, ring.chunk_size, ring.head_dim, key.shape[0], key.shape[2]]
    strides = [*key.stride()[:3], *value.stride()[:3], *(mask.stride() if mask is not None else (0, 0))]
    parts = (ring.store, ring.centroid, ring.tail, ring.cursor, key, value, ring_index, mask)
    error = kernel.ring_write_on_cpu(*map(pointer, parts), (ctypes.c_int64 * 7)(*sizes), (ctypes.c_int64 * 8)(*strides))
    assert error is None, error


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rings", "rows", "ring_index"),
    [(2, 2, None), (1, 3, None), (3, 4, (2, 0, 2, 2)), (1, 1, None)],
    ids=["own", "shared", "indexed", "one"],
)
@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_equals_the_reference_bit_for_bit(
    kernel: ctypes.CDLL, rings: int, rows: int, ring_index: tuple[int, ...] | None, masked: bool, chunk_size: int
) -> None:
    ours, wanted = (new_ring(rings=rings, chunk_size=chunk_size, head_dim=5) for _ in range(2))
    index = torch.tensor(ring_index, dtype=torch.int32) if ring_index else None
    for tokens in (7, 1, 2, 70, 3):  # 70: more than the ring holds, and more than the plan kernel has threads
        key, value = (torch.randn(rows, tokens, 2, 5).transpose(1, 2) for _ in range(2))
        mask = torch.rand(tokens, rows).t() < 0.6 if masked else None
        write(kernel, ours, key, value, index, mask)
        ring_write(wanted, key, value, ring_index=index, mask=mask, impl="reference")
        for name in ("store", "centroid", "cursor"):
            assert torch.equal(getattr(ours, name), getattr(wanted, name)), name
        for ring in range(rings):
            open_tokens = int(wanted.cursor[ring]) % chunk_size
            assert torch.equal(ours.tail[ring, :, :, :open_tokens], wanted.tail[ring, :, :, :open_tokens])


def test_a_row_whose_ring_does_not_exist_is_dropped(kernel: ctypes.CDLL) -> None:
    ours, wanted = new_ring(), new_ring()
    key, value = torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    write(kernel, ours, key, value, torch.tensor([0, 7, -1], dtype=torch.int32), None)
    ring_write(wanted, key[:1], value[:1], ring_index=torch.tensor([0], dtype=torch.int32), impl="reference")
    assert torch.equal(ours.store, wanted.store) and torch.equal(ours.cursor, wanted.cursor)
