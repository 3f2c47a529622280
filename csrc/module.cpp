// The Python module: importing it registers the kernels; `build_info` says how it was built and what it
// found. Written against Python's limited API, so that one binary serves every Python from 3.10 on.
#include <Python.h>

#include <map>
#include <string>

#include "common/simd.h"

#define LONGMEM_STRING_(x) #x
#define LONGMEM_STRING(x) LONGMEM_STRING_(x)

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  info["version"] = LONGMEM_STRING(LONGMEM_VERSION);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["simd"] = longmem::simd_name(longmem::simd_level());
#ifdef LONGMEM_CUDA
  info["cuda"] = LONGMEM_STRING(LONGMEM_CUDA_VERSION);
  info["cuda_architectures"] = LONGMEM_STRING(LONGMEM_CUDA_ARCHITECTURES);
#else
  info["cuda"] = "";
  info["cuda_architectures"] = "";
#endif
  return info;
}

PyObject* build_info_as_dict(PyObject*, PyObject*) {
  PyObject* dict = PyDict_New();
  if (dict == nullptr) return nullptr;
  for (const auto& [name, text] : build_info()) {
    PyObject* value = PyUnicode_FromString(text.c_str());
    const bool failed = value == nullptr || PyDict_SetItemString(dict, name.c_str(), value) != 0;
    Py_XDECREF(value);
    if (failed) {
      Py_DECREF(dict);
      return nullptr;
    }
  }
  return dict;
}

PyMethodDef methods[] = {
    {"build_info", build_info_as_dict, METH_NOARGS,
     "Version, compiler, SIMD level of this CPU, CUDA version and architectures ('' when built without "
     "CUDA)."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled kernels of longmem_kernels.",
    0,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
