// What generated CUDA C++ needs to run on a processor, for tests of its numbers: blocks one after another, threads of a
// block as fibers that take turns at barriers. Slow, and blind to races between threads that run at once.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct Place {
  unsigned x, y, z;
};
static Place threadIdx, blockIdx, blockDim, gridDim;

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };

static std::vector<unsigned char> pool;
static inline unsigned char *dynamic_shared() { return (unsigned char *)(((uintptr_t)pool.data() + 127) / 128 * 128); }

// ---------------------------------------------------------------------- threads of a block

static constexpr size_t STACK = 256 << 10;
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool ended = false;
};
struct Barrier {
  unsigned waiting = 0, generation = 0;
};
static std::vector<Thread> threads;
static Barrier block_barrier;
static std::vector<Barrier> warp_barriers;
static ucontext_t scheduler;
static unsigned current, alive;

static inline void let_others_run() {
  const unsigned own = current;
  swapcontext(&threads[own].context, &scheduler);
}
static inline void wait_at(Barrier &barrier, unsigned size) {
  const unsigned generation = barrier.generation;
  if (++barrier.waiting >= size) barrier.waiting = 0, ++barrier.generation;
  while (barrier.generation == generation) let_others_run();
}
static inline void __syncthreads() { wait_at(block_barrier, alive); }
static inline unsigned warp_size() {
  const unsigned first = current / 32 * 32, left = (unsigned)threads.size() - first;
  return left < 32 ? left : 32;
}
static inline void __syncwarp() { wait_at(warp_barriers[current / 32], warp_size()); }

static float lanes[1024];
static inline float __shfl_xor_sync(unsigned, float value, int mask) {
  lanes[current] = value;
  __syncwarp();
  const float other = lanes[current ^ (unsigned)mask];
  __syncwarp();
  return other;
}

// ---------------------------------------------------------------------- arithmetic

#define __cosf cosf  // glibc has functions of the card's names
#define __sinf sinf
static inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline unsigned bits_of(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static inline void wait_for_inputs() {}
static inline void let_next_start() {}
#ifdef BFLOAT16
static inline float widen(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
static inline unsigned short narrowed(float x) {
  const unsigned bits = bits_of(x);
  return x != x ? 0x7fc0 : (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
static inline float widen(unsigned short x) {
  _Float16 value;
  memcpy(&value, &x, 2);
  return (float)value;
}
static inline unsigned short narrowed(float x) {
  const _Float16 value = (_Float16)x;
  unsigned short bits;
  memcpy(&bits, &value, 2);
  return bits;
}
#endif
static inline float widen_low(unsigned x) { return widen((unsigned short)x); }
static inline float widen_high(unsigned x) { return widen((unsigned short)(x >> 16)); }
static inline unsigned narrow2(float low, float high) { return narrowed(low) | (unsigned)narrowed(high) << 16; }

static inline float exp2_of(float x) { return exp2f(x); }

// ---------------------------------------------------------------------- copies and matrix units

static inline void copy_16(uint4 *to, const void *from, bool present) {
  if (present)
    memcpy(to, from, 16);
  else
    memset(to, 0, 16);
}
static inline void copies_end_here() {}
template <int later>
static inline void wait_for_copies() {}

// m16n8k16: a register holds two numbers of a pair of columns of a (rows of b).
static unsigned given_a[1024][4], given_b[1024][2];
static inline float half_of(unsigned pair, int which) { return which ? widen_high(pair) : widen_low(pair); }
static inline void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  memcpy(given_a[current], a, 16);
  given_b[current][0] = b0, given_b[current][1] = b1;
  __syncwarp();
  const unsigned first = current / 32 * 32, lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, high = (unsigned)i / 2, column = 2 * (lane % 4) + (unsigned)i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned part = k % 8 / 2, far = k / 8;
      sums[i] += half_of(given_a[first + 4 * row + part][2 * far + high], k % 2) *
                 half_of(given_b[first + 4 * column + part][far], k % 2);
    }
  }
  __syncwarp();
}

// ---------------------------------------------------------------------- launches

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
  kernel(*(A *)arguments[I]...);
}

// The kernel and its arguments are globals: a fiber's function takes none that are wide enough.
static void (*body)(void **);
static void **given;
static void fiber() {
  body(given);
  threads[current].ended = true;
  --alive;
  // whoever waits for all that are left must not wait for this one
  if (alive && block_barrier.waiting >= alive) block_barrier.waiting = 0, ++block_barrier.generation;
}

// sizes: the grid's three, threads of a block, bytes of shared memory.
static void run(void (*kernel)(void **), void **arguments, const unsigned *sizes) {
  body = kernel, given = arguments;
  gridDim = {sizes[0], sizes[1], sizes[2]}, blockDim = {sizes[3], 1, 1};
  pool.assign(sizes[4] + 256, 0xff);  // what nobody has written must not be read: it is no number
  threads.resize(sizes[3]);
  for (auto &thread : threads) thread.stack.resize(STACK);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        memset(pool.data(), 0xff, pool.size());
        block_barrier = {}, alive = sizes[3];
        warp_barriers.assign((sizes[3] + 31) / 32, {});
        for (auto &thread : threads) {
          thread.ended = false;
          getcontext(&thread.context);
          thread.context.uc_stack.ss_sp = thread.stack.data();
          thread.context.uc_stack.ss_size = STACK;
          thread.context.uc_link = &scheduler;
          makecontext(&thread.context, fiber, 0);
        }
        while (alive)
          for (current = 0; current < threads.size(); ++current)
            if (!threads[current].ended) {
              threadIdx = {current, 0, 0};
              swapcontext(&scheduler, &threads[current].context);
            }
      }
}

#define KERNEL(exported, kernel)                                                                     \
  template <class... A> static void exported##_call(void (*f)(A...), void **arguments) {             \
    call(f, arguments, std::index_sequence_for<A...>{});                                              \
  }                                                                                                   \
  extern "C" void exported(void **arguments, const unsigned *sizes) {                                 \
    run([](void **own) { exported##_call(kernel, own); }, arguments, sizes);                          \
  }
