// The loss and its gradient with one read and one write of the logits, where one rank has the whole vocabulary: a
// cluster of blocks keeps a row in its shared memory and passes over it three times there. The blocks tell each other
// what ranks tell each other in the split form, through shared memory instead of a network.
#include "nelbo_passes.cuh"

namespace xdlm {

constexpr int kThreads = 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksPerSm = 2;  // a whole row in a block
#else
constexpr int kBlocksPerSm = 3;  // one loads while others compute
#endif
constexpr int kMostBlocks = 8;   // the largest cluster that every device with clusters has
constexpr size_t kScratchBytes = 1024;
constexpr size_t kSliceBytes = 72 * 1024;  // of a row in a block: kBlocksPerSm of them fit an SM of 228 KiB

struct Scratch {
  unsigned char reduce[kReduceBytes];
  float stats[4 * kMostBlocks], sums[2 * kMostBlocks];  // a message from every block of the cluster
  Merged merged;
  Terms terms;
};
static_assert(sizeof(Scratch) <= kScratchBytes, "the logits come after it");

template <class T>
XDLM_KERNEL(kThreads, kBlocksPerSm) whole_kernel(XdlmRows rows, float* XDLM_RESTRICT loss, float* XDLM_RESTRICT terms,
                                                 T* out, int64_t out_stride, int cluster, int slice) {
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared_memory());
  T* kept = reinterpret_cast<T*>(shared_memory() + kScratchBytes);
  const T* logits = static_cast<const T*>(rows.logits);
  const int64_t row = block_index() / cluster, N = rows.rows;
  const int rank = int(block_index() % cluster), begin = rank * slice;
  const int columns = larger(0, smaller(slice, int(rows.columns) - begin));
  const Part target = part_of(rows, row, begin, columns, aligned(out, out_stride));
  T* mine = out == nullptr ? nullptr : out + row * out_stride + begin;
  if (!is_live(rows, row)) {
    if (out != nullptr) zero_pass(mine, target);
    if (rank == 0 && thread_index() == 0) {
      loss[row] = 0.f;
      write_terms(terms, N, row, Terms{0.f, 1.f, 0.f, 0.f, 0.f, 0.f});
    }
    return;
  }
  if (cluster > 1) sync_cluster();  // nobody writes to a block that has not started

  const Part part = part_of(rows, row, begin, columns, aligned(logits, rows.row_stride));
  Part in_shared = part;
  in_shared.vectors = (columns + 7) & ~7;
  keep(logits + row * rows.row_stride + begin, part, kept);
  Softmax softmax = stats_pass(kept, in_shared);
  softmax = reduce_block(softmax, MergeSoftmax{}, reinterpret_cast<Softmax*>(scratch.reduce));
  if (thread_index() < cluster) {
    float* message = in_block(scratch.stats, thread_index()) + 4 * rank;
    message[0] = softmax.top;
    message[1] = softmax.sum;
    message[2] = pick(kept, part.x0, part);
    message[3] = pick(kept, part.zt, part);
  }
  exchange(cluster);
  if (thread_index() == 0) scratch.merged = merge_token(token_of(rows, row), scratch.stats, cluster, 1);
  sync_block();

  if (rows.uniform_ratio > 0.f) {
    Sums sums = sums_pass(kept, in_shared, scratch.merged.top, scratch.merged.scale);
    sums = reduce_block(sums, AddSums{}, reinterpret_cast<Sums*>(scratch.reduce));
    if (thread_index() < cluster) {
      float* message = in_block(scratch.sums, thread_index()) + 2 * rank;
      message[0] = sums.T;
      message[1] = sums.s;
    }
    exchange(cluster);
  }
  if (thread_index() == 0) {
    const float value =
        finish_token(token_of(rows, row), scratch.merged, scratch.sums, cluster, 1, scratch.terms);
    if (rank == 0) {
      loss[row] = value;
      write_terms(terms, N, row, scratch.terms);
    }
  }
  sync_block();
  if (out != nullptr) grad_pass(kept, in_shared, scratch.terms, mine, target);
}

int64_t slice_of(const XdlmRows& rows, int64_t cluster) {
  return ((rows.columns + cluster - 1) / cluster + 7) / 8 * 8;
}

int64_t row_bytes(const XdlmRows& rows, int64_t cluster) {
  return slice_of(rows, cluster) * (rows.dtype == kFloat32 ? 4 : 2);
}

}  // namespace xdlm

using namespace xdlm;

int64_t xdlm_nelbo_cluster(const XdlmRows* rows) {
  if (!xdlm_has_clusters())  // one block with all the shared memory that it can have
    return row_bytes(*rows, 1) + int64_t(kScratchBytes) <= most_shared_bytes() ? 1 : 0;
  for (int64_t cluster = 1; cluster <= kMostBlocks; cluster *= 2)
    if (row_bytes(*rows, cluster) <= int64_t(kSliceBytes)) return cluster;
  return 0;
}

int xdlm_nelbo_whole(const XdlmRows* rows, float* loss_N, float* terms_6N, void* out, int64_t out_stride,
                     int64_t cluster, void* stream) {
  const int error = check(*rows);
  if (error != 0) return error;
  if (cluster == 0) cluster = xdlm_nelbo_cluster(rows);
  if (cluster == 0) return kDoesNotFit;
  if (cluster > 1 && !xdlm_has_clusters()) return kNoClusters;
  const int slice = int(slice_of(*rows, cluster)), threads = threads_for(slice, kThreads);
  const size_t bytes = kScratchBytes + size_t(row_bytes(*rows, cluster));
  const int64_t blocks = rows->rows * cluster;
  if (rows->dtype == kFloat32)
    return launch(whole_kernel<float>, blocks, threads, int(cluster), bytes, stream, *rows, loss_N, terms_6N,
                  (float*)out, out_stride, int(cluster), slice);
  return launch(whole_kernel<bf16>, blocks, threads, int(cluster), bytes, stream, *rows, loss_N, terms_6N, (bf16*)out,
                out_stride, int(cluster), slice);
}
