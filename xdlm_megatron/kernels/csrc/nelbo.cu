// The loss in passes over rows of logits, with room for messages between ranks: stats, merge, sums, finish, grad
// (diffusion/row_ops.py says what each computes). One block a row. A dead row (no loss) is never read.
#include "nelbo_passes.cuh"

namespace xdlm {

constexpr int kThreads = 256;

template <class T> XDLM_KERNEL(kThreads) stats_kernel(XdlmRows rows, float* XDLM_RESTRICT stats) {
  const int64_t row = block_index(), N = rows.rows;
  const T* logits = static_cast<const T*>(rows.logits);
  const bool live = is_live(rows, row);
  float l_x = 0.f, l_z = -INFINITY;  // of a dead row: finite numbers that nobody uses
  Softmax softmax{0.f, 1.f};
  if (live) {
    const Part part = part_of(rows, row, 0, int(rows.columns), aligned(logits, rows.row_stride));
    const T* source = logits + row * rows.row_stride;
    softmax = reduce_block(stats_pass(source, part), MergeSoftmax{}, reinterpret_cast<Softmax*>(shared_memory()));
    l_x = pick(source, part.x0, part);
    l_z = pick(source, part.zt, part);
  }
  if (thread_index() == 0) {
    stats[row] = softmax.top;
    stats[N + row] = softmax.sum;
    stats[2 * N + row] = l_x;
    stats[3 * N + row] = l_z;
  }
}

XDLM_KERNEL(kThreads) merge_kernel(XdlmRows rows, const float* XDLM_RESTRICT stats, int64_t ranks,
                                   float* XDLM_RESTRICT merged) {
  const int64_t N = rows.rows, row = block_index() * block_threads() + thread_index();
  if (row >= N) return;
  const Merged m = merge_token(token_of(rows, row), stats + row, ranks, N);
  merged[row] = m.top;
  merged[N + row] = m.scale;
  merged[2 * N + row] = m.rest;
  merged[3 * N + row] = m.log_px;
  merged[4 * N + row] = m.p_z;
}

template <class T>
XDLM_KERNEL(kThreads) sums_kernel(XdlmRows rows, const float* XDLM_RESTRICT merged, float* XDLM_RESTRICT out) {
  const int64_t row = block_index(), N = rows.rows;
  Sums sums{0.f, 0.f};
  if (is_live(rows, row)) {
    const T* logits = static_cast<const T*>(rows.logits);
    const Part part = part_of(rows, row, 0, int(rows.columns), aligned(logits, rows.row_stride));
    sums = sums_pass(logits + row * rows.row_stride, part, merged[row], merged[N + row]);
    sums = reduce_block(sums, AddSums{}, reinterpret_cast<Sums*>(shared_memory()));
  }
  if (thread_index() == 0) {
    out[row] = sums.T;
    out[N + row] = sums.s;
  }
}

XDLM_KERNEL(kThreads) finish_kernel(XdlmRows rows, const float* XDLM_RESTRICT merged, const float* XDLM_RESTRICT sums,
                                    int64_t ranks, float* XDLM_RESTRICT loss, float* XDLM_RESTRICT terms) {
  const int64_t N = rows.rows, row = block_index() * block_threads() + thread_index();
  if (row >= N) return;
  Terms t{0.f, 1.f, 0.f, 0.f, 0.f, 0.f};
  float value = 0.f;
  if (is_live(rows, row)) {
    const Merged m{merged[row], merged[N + row], merged[2 * N + row], merged[3 * N + row], merged[4 * N + row]};
    value = finish_token(token_of(rows, row), m, sums + row, ranks, N, t);
  }
  loss[row] = value;
  write_terms(terms, N, row, t);
}

template <class T>
XDLM_KERNEL(kThreads) grad_kernel(XdlmRows rows, const float* XDLM_RESTRICT terms, const float* XDLM_RESTRICT upstream,
                                  T* out, int64_t out_stride) {
  const int64_t row = block_index(), N = rows.rows;
  const T* logits = static_cast<const T*>(rows.logits);
  const Part part = part_of(rows, row, 0, int(rows.columns), aligned(logits, rows.row_stride));
  const Part target = part_of(rows, row, 0, int(rows.columns), aligned(out, out_stride));
  Terms t{terms[row], terms[N + row], terms[2 * N + row], terms[3 * N + row], terms[4 * N + row], terms[5 * N + row]};
  const float factor = upstream != nullptr ? upstream[row] : 1.f;
  if (is_dead(t) || factor == 0.f) {
    zero_pass(out + row * out_stride, target);
    return;
  }
  t.R *= factor;
  t.G *= factor;
  t.X *= factor;
  t.Z *= factor;
  grad_pass(logits + row * rows.row_stride, part, t, out + row * out_stride, target);
}

// out = upstream * out, in place, for a gradient that was made for an upstream gradient of 1. A row whose factor is
// 1 is not touched: where all are, this costs a launch and no more.
template <class T>
XDLM_KERNEL(kThreads) rescale_kernel(XdlmRows rows, const float* XDLM_RESTRICT upstream, T* XDLM_RESTRICT grad) {
  const int64_t row = block_index();
  const float factor = upstream[row];
  if (factor == 1.f) return;
  T* target = grad + row * rows.row_stride;
  const Part part = part_of(rows, row, 0, int(rows.columns), aligned(grad, rows.row_stride));
  if (factor == 0.f) {
    zero_pass(target, part);
    return;
  }
  for (int j = 8 * thread_index(); j < part.columns; j += 8 * block_threads()) {
    Vector<T> v;
    float x[8];
    read8(target, j, part, v);
    decode(v, x);
    XDLM_UNROLL for (int i = 0; i < 8; ++i) x[i] *= factor;
    write8(target, j, part, x);
  }
}

int64_t token_blocks(const XdlmRows& rows) {
  const int threads = smaller(kThreads, kMostThreads);
  return (rows.rows + threads - 1) / threads;
}

}  // namespace xdlm

using namespace xdlm;

// Launch KERNEL<float> or KERNEL<bf16>, a block a row.
#define XDLM_LAUNCH_ROWS(KERNEL, ...)                                                                               \
  const int error = check(*rows);                                                                                   \
  if (error != 0) return error;                                                                                     \
  const int threads = threads_for(rows->columns, kThreads);                                                         \
  return rows->dtype == kFloat32                                                                                    \
             ? launch(KERNEL<float>, rows->rows, threads, 1, kReduceBytes, stream, *rows, __VA_ARGS__)              \
             : launch(KERNEL<bf16>, rows->rows, threads, 1, kReduceBytes, stream, *rows, __VA_ARGS__)

int xdlm_nelbo_stats(const XdlmRows* rows, float* stats_4N, void* stream) { XDLM_LAUNCH_ROWS(stats_kernel, stats_4N); }

int xdlm_nelbo_merge(const XdlmRows* rows, const float* stats_R4N, int64_t ranks, float* merged_5N, void* stream) {
  return launch(merge_kernel, token_blocks(*rows), smaller(kThreads, kMostThreads), 1, 0, stream, *rows, stats_R4N,
                ranks, merged_5N);
}

int xdlm_nelbo_sums(const XdlmRows* rows, const float* merged_5N, float* sums_2N, void* stream) {
  XDLM_LAUNCH_ROWS(sums_kernel, merged_5N, sums_2N);
}

int xdlm_nelbo_finish(const XdlmRows* rows, const float* merged_5N, const float* sums_R2N, int64_t ranks, float* loss_N,
                      float* terms_6N, void* stream) {
  return launch(finish_kernel, token_blocks(*rows), smaller(kThreads, kMostThreads), 1, 0, stream, *rows, merged_5N,
                sums_R2N, ranks, loss_N, terms_6N);
}

int xdlm_nelbo_grad(const XdlmRows* rows, const float* terms_6N, const float* upstream_N, void* out, int64_t out_stride,
                    void* stream) {
  const int error = check(*rows);
  if (error != 0) return error;
  const int threads = threads_for(rows->columns, kThreads);
  if (rows->dtype == kFloat32)
    return launch(grad_kernel<float>, rows->rows, threads, 1, 0, stream, *rows, terms_6N, upstream_N, (float*)out,
                  out_stride);
  return launch(grad_kernel<bf16>, rows->rows, threads, 1, 0, stream, *rows, terms_6N, upstream_N, (bf16*)out,
                out_stride);
}

int xdlm_nelbo_rescale(const XdlmRows* rows, const float* upstream_N, void* grad, void* stream) {
  const int error = check(*rows);
  if (error != 0) return error;
  const int threads = threads_for(rows->columns, kThreads);
  if (rows->dtype == kFloat32)
    return launch(rescale_kernel<float>, rows->rows, threads, 1, 0, stream, *rows, upstream_N, (float*)grad);
  return launch(rescale_kernel<bf16>, rows->rows, threads, 1, 0, stream, *rows, upstream_N, (bf16*)grad);
}
