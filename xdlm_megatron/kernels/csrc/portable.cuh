// What nvcc and g++ both understand: storage types, elementary functions, the block and its cluster, and launches.
// A kernel includes this and uses nothing of CUDA by name.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "api.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define XDLM_FN __host__ __device__ __forceinline__
#define XDLM_DEVICE __device__ __forceinline__
// most threads a block, and optionally least blocks an SM
#define XDLM_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define XDLM_UNROLL _Pragma("unroll")
#define XDLM_ROLLED _Pragma("unroll 1")
#define XDLM_RESTRICT __restrict__
#else
#include "host_shim.h"
#define XDLM_FN inline
#define XDLM_DEVICE inline
#define XDLM_KERNEL(...) void
#define XDLM_UNROLL
#define XDLM_ROLLED
#define XDLM_RESTRICT __restrict__
#endif

namespace xdlm {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
#if defined(__CUDACC__)
constexpr int kMostThreads = 1024;
#else
constexpr int kMostThreads = 64;  // host threads are slow; two warps see all that more would
#endif

template <class T> XDLM_FN T smaller(T a, T b) { return a < b ? a : b; }
template <class T> XDLM_FN T larger(T a, T b) { return a < b ? b : a; }
// fmaxf drops a NaN; this keeps it.
XDLM_FN float max_or_nan(float a, float b) { return (a > b || a != a) ? a : b; }

// ---- storage: float and bfloat16 --------------------------------------------------------------------------------
struct bf16 {
  uint16_t bits;
};
XDLM_FN float to_float(float v) { return v; }
XDLM_FN float to_float(bf16 v) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(uint32_t(v.bits) << 16);
#else
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
#endif
}
XDLM_FN uint32_t bits_of(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
#endif
}
XDLM_FN int64_t bits_of(double d) {
  int64_t bits;
  memcpy(&bits, &d, 8);
  return bits;
}
XDLM_FN double double_of(int64_t bits) {
  double d;
  memcpy(&d, &bits, 8);
  return d;
}
template <class T> XDLM_FN T from_float(float f);
template <> XDLM_FN float from_float<float>(float f) { return f; }
template <> XDLM_FN bf16 from_float<bf16>(float f) {  // rounds to nearest, ties to even
  bf16 r;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(f));
#else
  const uint32_t bits = bits_of(f);
  r.bits = f != f ? uint16_t(0x7fff) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
#endif
  return r;
}

// A vector of 8 elements: one 16-byte access for bfloat16, two for float. The address is a multiple of 16.
struct alignas(16) Quad {
  uint32_t word[4];
};
template <class T> union Vector {
  Quad quads[sizeof(T) / 2];
  T items[8];
  XDLM_FN Vector() {}
};
template <class T> XDLM_FN void load(const T* address, Vector<T>& v) {
  XDLM_UNROLL for (int i = 0; i < int(sizeof(T) / 2); ++i) v.quads[i] = reinterpret_cast<const Quad*>(address)[i];
}
template <class T> XDLM_FN void store(T* address, const Vector<T>& v) {
  XDLM_UNROLL for (int i = 0; i < int(sizeof(T) / 2); ++i) reinterpret_cast<Quad*>(address)[i] = v.quads[i];
}
// Start to copy a vector of 8 from global to shared memory; it is there, for this thread, after wait_for_copies().
template <class T> XDLM_FN void copy_async(T* shared, const T* global) {
#if defined(__CUDA_ARCH__)
  const unsigned target = unsigned(__cvta_generic_to_shared(shared));
  XDLM_UNROLL for (int i = 0; i < int(sizeof(T) / 2); ++i)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + 16 * i),
                 "l"(reinterpret_cast<const Quad*>(global) + i)
                 : "memory");
#else
  memcpy(shared, global, 8 * sizeof(T));
#endif
}
XDLM_FN void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
template <class T> XDLM_FN void decode(const Vector<T>& v, float (&x)[8]) {
  XDLM_UNROLL for (int i = 0; i < 8; ++i) x[i] = to_float(v.items[i]);
}
template <class T> XDLM_FN void encode(const float (&x)[8], Vector<T>& v) {
  XDLM_UNROLL for (int i = 0; i < 8; ++i) v.items[i] = from_float<T>(x[i]);
}
#if defined(__CUDA_ARCH__)
template <> __device__ __forceinline__ void encode<bf16>(const float (&x)[8], Vector<bf16>& v) {  // two in one instruction
  XDLM_UNROLL for (int i = 0; i < 4; ++i)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v.quads[0].word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
}
#endif

// ---- elementary functions: one instruction each on the device ---------------------------------------------------
XDLM_FN float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
XDLM_FN float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}
XDLM_FN float fast_inverse(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// ---- the block and its cluster ----------------------------------------------------------------------------------
#if defined(__CUDACC__)
XDLM_DEVICE int thread_index() { return threadIdx.x; }
XDLM_DEVICE int block_threads() { return blockDim.x; }
XDLM_DEVICE int64_t block_index() { return blockIdx.x; }
XDLM_DEVICE void sync_block() { __syncthreads(); }
XDLM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
XDLM_DEVICE int first_bit(uint64_t bits) { return __ffsll(static_cast<long long>(bits)) - 1; }
// The value of another lane of the warp. T is 4 or 8 bytes.
template <class T> XDLM_DEVICE T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  if (sizeof(T) == 8) {
    unsigned long long bits;
    memcpy(&bits, &value, 8);
    bits = __shfl_sync(0xffffffffu, bits, lane);
    memcpy(&value, &bits, 8);
  } else {
    unsigned bits;
    memcpy(&bits, &value, 4);
    bits = __shfl_sync(0xffffffffu, bits, lane);
    memcpy(&value, &bits, 4);
  }
  return value;
}
// In shared memory, in any order among the threads of a block; a sum's value before.
XDLM_DEVICE uint32_t atomic_add(uint32_t* place, uint32_t value) { return atomicAdd(place, value); }
XDLM_DEVICE void atomic_max(int64_t* place, int64_t value) {
  atomicMax(reinterpret_cast<long long*>(place), static_cast<long long>(value));
}
XDLM_DEVICE int64_t peek(const int64_t* place) { return *static_cast<const volatile int64_t*>(place); }
#if __CUDA_ARCH__ >= 900
XDLM_DEVICE void sync_cluster() {
  // not .aligned: the threads of a warp may come from different branches
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
template <class T> XDLM_DEVICE T* in_block(T* place, int rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(place)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}
#else  // clusters begin with compute capability 9.0; below, a cluster is one block
XDLM_DEVICE void sync_cluster() { __syncthreads(); }
template <class T> XDLM_DEVICE T* in_block(T* place, int) { return place; }
#endif
#else
inline int thread_index() { return host::context.thread; }
inline int block_threads() { return host::context.threads; }
inline int64_t block_index() { return host::context.block; }
inline void sync_block() { host::context.own->barrier.arrive_and_wait(); }
inline unsigned char* shared_memory() { return host::context.own->shared(); }
inline int first_bit(uint64_t bits) { return __builtin_ctzll(bits); }
template <class T> T shuffle(T value, int lane) { return host::shuffle(value, lane); }
inline uint32_t atomic_add(uint32_t* place, uint32_t value) { return __atomic_fetch_add(place, value, __ATOMIC_RELAXED); }
inline void atomic_max(int64_t* place, int64_t value) {
  int64_t old = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(place, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}
inline int64_t peek(const int64_t* place) { return __atomic_load_n(place, __ATOMIC_RELAXED); }
inline void sync_cluster() { host::context.cluster->barrier.arrive_and_wait(); }
template <class T> T* in_block(T* place, int rank) {
  return (T*)((unsigned char*)place - shared_memory() + host::context.cluster->blocks[rank]->shared());
}
#endif

// The blocks of a cluster have written to each other.
XDLM_DEVICE void exchange(int cluster) {
  if (cluster > 1) {
    sync_cluster();
  } else {
    sync_block();
  }
}

// Combine a value of every thread, in a fixed order; every thread gets the result. `room` holds 32 values in shared
// memory and may be used again at once. The block's size is a multiple of 32.
template <class T, class Combine> XDLM_DEVICE T reduce_block(T value, Combine combine, T* room) {
  for (int mask = 16; mask > 0; mask /= 2) value = combine(value, shuffle(value, (thread_index() % 32) ^ mask));
  if (thread_index() % 32 == 0) room[thread_index() / 32] = value;
  sync_block();
  value = room[0];
  for (int warp = 1; warp < block_threads() / 32; ++warp) value = combine(value, room[warp]);
  sync_block();
  return value;
}

// ---- launches ---------------------------------------------------------------------------------------------------
// What a block may have of the current device's shared memory.
inline int64_t most_shared_bytes() {
#if defined(__CUDACC__)
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return most;
#else
  return 227 * 1024;
#endif
}

// The caller has made the tensors' device current. Returns CUDA's error number, 0 if all is well.
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, int cluster, size_t shared_bytes, void* stream,
           A... arguments) {
  if (blocks == 0) return 0;
#if defined(__CUDACC__)
  if (shared_bytes > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return int(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = cudaStream_t(stream);
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim.x = unsigned(cluster);
  attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
  config.attrs = attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return int(cudaLaunchKernelEx(&config, kernel, P(arguments)...));
#else
  (void)stream;
  host::launch(kernel, blocks, threads, cluster, shared_bytes, P(arguments)...);
  return 0;
#endif
}

// Threads for a row: enough for its vectors of 8, a multiple of 32, at most `most`.
inline int threads_for(int64_t columns, int most) {
  int64_t vectors = (columns + 7) / 8;
  return int(smaller<int64_t>((vectors + 31) / 32 * 32, smaller(most, kMostThreads)));
}

}  // namespace xdlm
