// Runs CUDA kernels on the host: one std::thread for every CUDA thread of a cluster, std::barrier for block, warp
// and cluster. g++ compiles the kernels' own source with it, shared memory and distributed shared memory included,
// so that tests and sanitizers see the code that a GPU runs. It shows wrong results, races and reads out of bounds;
// it does not show a missing cluster barrier at the start, nor the errors of approximate instructions.
#pragma once
#include <barrier>
#include <memory>
#include <thread>
#include <vector>
#include <stdint.h>
#include <string.h>

namespace host {

struct Warp {
  std::barrier<> barrier;
  uint64_t slot[2][32];
  explicit Warp(int lanes) : barrier(lanes) {}
};

struct Block {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[]> memory;
  size_t shared_bytes;
  Block(int threads, size_t bytes) : barrier(threads), memory(new unsigned char[bytes + 128]), shared_bytes(bytes) {
    for (int i = 0; i < threads; i += 32) warps.emplace_back(new Warp(threads - i < 32 ? threads - i : 32));
  }
  unsigned char* shared() { return (unsigned char*)((uintptr_t(memory.get()) + 127) & ~uintptr_t(127)); }
};

struct Cluster {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  explicit Cluster(int threads) : barrier(threads) {}
};

struct Context {
  int thread, threads, rank, parity;
  int64_t block;
  Block* own;
  Cluster* cluster;
};
inline thread_local Context context;

// The threads live as long as the launch and take one cluster of blocks after the other.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int cluster_size, size_t shared_bytes, A... arguments) {
  Cluster cluster(threads * cluster_size);
  for (int r = 0; r < cluster_size; ++r) cluster.blocks.emplace_back(new Block(threads, shared_bytes));
  std::vector<std::thread> workers;
  for (int r = 0; r < cluster_size; ++r)
    for (int t = 0; t < threads; ++t)
      workers.emplace_back([&, r, t] {
        Block* own = cluster.blocks[r].get();
        for (int64_t first = 0; first < blocks; first += cluster_size) {
          if (t == 0) memset(own->shared(), 0xff, shared_bytes);  // NaN: what is read before it is written shows
          cluster.barrier.arrive_and_wait();
          context = Context{t, threads, r, 0, first + r, own, &cluster};
          kernel(P(arguments)...);
          cluster.barrier.arrive_and_wait();
        }
      });
  for (auto& worker : workers) worker.join();
}

// One barrier a shuffle: the slots alternate, and nobody writes a slot again before all have read it.
template <class T> T shuffle(T value, int lane) {
  Context& c = context;
  Warp& warp = *c.own->warps[c.thread / 32];
  uint64_t* slot = warp.slot[c.parity];
  c.parity ^= 1;
  static_assert(sizeof(T) <= 8, "a slot holds 8 bytes");
  memcpy(&slot[c.thread % 32], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  memcpy(&value, &slot[lane], sizeof(T));
  return value;
}

}  // namespace host
