#include "portable.cuh"

namespace xdlm {
XDLM_KERNEL(32) probe_kernel() {}  // says for what the others were compiled
}  // namespace xdlm

const char* xdlm_error(int64_t code) {
  switch (code) {
    case kBadDtype: return "logits must be float32 or bfloat16";
    case kBadShape: return "a size is negative, or the shard has no columns";
    case kBadBinding: return "the library was built from other sources than its binding";
    case kDoesNotFit: return "a row does not fit into the shared memory of a cluster";
    case kNoClusters: return "a row in several blocks, where the GPU or the code that it runs has no clusters";
  }
#if defined(__CUDACC__)
  return cudaGetErrorString(cudaError_t(code));
#else
  return "unknown error";
#endif
}

int64_t xdlm_rows_bytes(void) { return sizeof(XdlmRows); }

int64_t xdlm_has_clusters(void) {
#if defined(__CUDACC__)
  int device = 0, major = 0;
  cudaFuncAttributes code{};
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaFuncGetAttributes(&code, (const void*)xdlm::probe_kernel) != cudaSuccess)
    return 0;
  return major >= 9 && code.ptxVersion >= 90;
#else
  return 1;
#endif
}
