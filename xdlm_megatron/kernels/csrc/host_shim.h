// Runs CUDA kernels on the host: g++ compiles their own source with it, shared memory and distributed shared memory
// included, so that tests see the code that a GPU runs. A CUDA thread is a fiber that runs until it waits for its
// block, warp or cluster, one after the other; under a sanitizer it is a std::thread. It shows wrong results, and
// with a sanitizer races and reads out of bounds; it does not show a missing cluster barrier at the start, nor the
// errors of approximate instructions.
#pragma once
#include <functional>
#include <memory>
#include <vector>
#include <stdint.h>
#include <string.h>
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#include <barrier>
#include <thread>
#else
#include <ucontext.h>
#endif

namespace host {

struct Block;
struct Cluster;
struct Context {
  int thread, threads, rank, parity;
  int64_t block;
  Block* own;
  Cluster* cluster;
};
inline thread_local Context context;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
using Barrier = std::barrier<>;

inline void run_together(int threads, const std::function<void(int)>& body) {
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) workers.emplace_back(body, t);
  for (auto& worker : workers) worker.join();
}
#else
constexpr size_t kStackBytes = 64 << 10;

struct Fibers {
  const std::function<void(int)>& body;
  std::vector<ucontext_t> places;
  std::vector<char> ended;
  int now = 0;
  ucontext_t scheduler;
};
inline thread_local Fibers* fibers;

class Barrier {
  int threads, waiting = 0;
  unsigned turn = 0;

 public:
  explicit Barrier(int threads) : threads(threads) {}
  void arrive_and_wait() {
    if (++waiting == threads) {
      waiting = 0;
      ++turn;
      return;
    }
    const Context mine = context;
    for (const unsigned before = turn; turn == before;) swapcontext(&fibers->places[fibers->now], &fibers->scheduler);
    context = mine;
  }
};

inline void run_fiber() {
  fibers->body(fibers->now);
  fibers->ended[fibers->now] = true;
}

// In the order of their numbers, each from one wait to the next, until all have ended.
inline void run_together(int threads, const std::function<void(int)>& body) {
  Fibers all{body, std::vector<ucontext_t>(threads), std::vector<char>(threads, false)};
  fibers = &all;
  const std::unique_ptr<char[]> stacks(new char[threads * kStackBytes]);
  for (int t = 0; t < threads; ++t) {
    getcontext(&all.places[t]);
    all.places[t].uc_stack.ss_sp = &stacks[t * kStackBytes];
    all.places[t].uc_stack.ss_size = kStackBytes;
    all.places[t].uc_link = &all.scheduler;
    makecontext(&all.places[t], run_fiber, 0);
  }
  for (int left = threads; left > 0;)
    for (all.now = 0; all.now < threads; ++all.now)
      if (!all.ended[all.now]) {
        swapcontext(&all.scheduler, &all.places[all.now]);
        left -= all.ended[all.now];
      }
}
#endif

struct Warp {
  Barrier barrier;
  uint64_t slot[2][32];
  explicit Warp(int lanes) : barrier(lanes) {}
};

struct Block {
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[]> memory;
  size_t shared_bytes;
  Block(int threads, size_t bytes) : barrier(threads), memory(new unsigned char[bytes + 128]), shared_bytes(bytes) {
    for (int i = 0; i < threads; i += 32) warps.emplace_back(new Warp(threads - i < 32 ? threads - i : 32));
  }
  unsigned char* shared() { return (unsigned char*)((uintptr_t(memory.get()) + 127) & ~uintptr_t(127)); }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  explicit Cluster(int threads) : barrier(threads) {}
};

// The threads live as long as the launch and take one cluster of blocks after the other.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int cluster_size, size_t shared_bytes, A... arguments) {
  Cluster cluster(threads * cluster_size);
  for (int r = 0; r < cluster_size; ++r) cluster.blocks.emplace_back(new Block(threads, shared_bytes));
  run_together(threads * cluster_size, [&](int index) {
    const int r = index / threads, t = index % threads;
    Block* own = cluster.blocks[r].get();
    for (int64_t first = 0; first < blocks; first += cluster_size) {
      if (t == 0) memset(own->shared(), 0xff, shared_bytes);  // NaN: what is read before it is written shows
      cluster.barrier.arrive_and_wait();
      context = Context{t, threads, r, 0, first + r, own, &cluster};
      kernel(P(arguments)...);
      cluster.barrier.arrive_and_wait();
    }
  });
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
