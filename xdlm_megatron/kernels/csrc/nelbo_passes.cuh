// One read of a row by the threads of a block; the row lies in global or in shared memory.
#pragma once
#include "nelbo_rows.cuh"

namespace xdlm {

constexpr size_t kReduceBytes = 256;  // room of reduce_block for 8-byte values

struct AddSums {
  XDLM_DEVICE Sums operator()(Sums a, Sums b) const { return {a.T + b.T, a.s + b.s}; }
};
struct MergeSoftmax {
  XDLM_DEVICE Softmax operator()(Softmax a, Softmax b) const { return merge(a, b); }
};

// ---- passes over some columns of a row by the threads of a block ------------------------------------------------
template <class T> XDLM_DEVICE Softmax stats_pass(const T* source, const Part& part) {
  Softmax softmax{-INFINITY, 0.f};
  for (int j = 8 * thread_index(); j < part.real; j += 8 * block_threads()) {
    Vector<T> v;
    float x[8];
    read8(source, j, part, v);
    decode(v, x);
    exclude8(x, j, part, true);
    add8(softmax, x);
  }
  return softmax;
}

template <class T> XDLM_DEVICE Sums sums_pass(const T* source, const Part& part, float top, float scale) {
  Sums sums{0.f, 0.f};
  for (int j = 8 * thread_index(); j < part.real; j += 8 * block_threads()) {
    Vector<T> v;
    float x[8];
    read8(source, j, part, v);
    decode(v, x);
    exclude8(x, j, part, true);
    exponentials8(x, top, scale);
    add8(sums, x, scale);
  }
  return sums;
}

// Copy the logits to shared memory that has room for whole vectors, all of them in flight at once. A thread may read
// its own vectors, which are those of the passes, the others' after a barrier.
template <class T> XDLM_DEVICE void keep(const T* source, const Part& part, T* kept) {
  for (int j = 8 * thread_index(); j < part.real; j += 8 * block_threads()) {
    if (j + 8 <= part.vectors) {
      copy_async(kept + j, source + j);
    } else {
      Vector<T> v;
      read8(source, j, part, v);
      store(kept + j, v);
    }
  }
  wait_for_copies();
}

// source and target may be the same; a thread writes what it has read itself.
template <class T>
XDLM_DEVICE void grad_pass(const T* source, const Part& part, const Terms& terms, T* target, const Part& target_part) {
  for (int j = 8 * thread_index(); j < part.columns; j += 8 * block_threads()) {
    float x[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    if (j < part.real) {
      Vector<T> v;
      read8(source, j, part, v);
      decode(v, x);
      exclude8(x, j, part, false);
      exponentials8(x, terms.top, terms.scale);
      gradient8(x, j, part, terms);
    }
    write8(target, j, target_part, x);
  }
}

template <class T> XDLM_DEVICE void zero_pass(T* target, const Part& part) {
  const float zero[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  for (int j = 8 * thread_index(); j < part.columns; j += 8 * block_threads()) write8(target, j, part, zero);
}

template <class T> XDLM_FN bool aligned(const T* address, int64_t stride) {
  return uintptr_t(address) % 16 == 0 && stride * int64_t(sizeof(T)) % 16 == 0;
}

XDLM_DEVICE void write_terms(float* terms, int64_t N, int64_t row, const Terms& t) {
  terms[row] = t.top;
  terms[N + row] = t.scale;
  terms[2 * N + row] = t.R;
  terms[3 * N + row] = t.G;
  terms[4 * N + row] = t.X;
  terms[5 * N + row] = t.Z;
}

inline int check(const XdlmRows& rows) {
  if (rows.dtype != kFloat32 && rows.dtype != kBfloat16) return kBadDtype;
  const bool sound = rows.rows >= 0 && rows.columns > 0 && rows.columns < (int64_t(1) << 31) - 8 && rows.first_id >= 0;
  return sound && rows.vocab_size < (int64_t(1) << 31) && rows.row_stride >= 0 ? 0 : kBadShape;
}

}  // namespace xdlm
