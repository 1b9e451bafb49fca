// chunks_f20_n6_c7_causal_bf16_avx2_0fedb046: written by rewriter from a specification; edit the template, not this file.
//   hidden = 12
//   expanded = 20
//   base = 6
//   chunk = 7
//   causal = True
//   averaged = True
//   bias = PositionBias.NONE
//   span = 256
//   rotary = True
//   gate = Activation.SILU
//   value = Activation.SILU
//   latent = Activation.SILU
//   dtype = bfloat16, instructions = avx2
//
// Mixed chunk attention between its projections. A task is a sequence, or a slice of its value features where threads
// would be idle otherwise: it walks over the chunks, and in each first works out squared scores. Then it goes from panel
// to panel of value features, as wide as accumulators in registers are: a chunk's panel is copied to where it stays in
// the nearest cache, scores times it and linear queries times the sum over the chunks before are added up, and the gate
// is multiplied in, before the panel joins the sum. Any number of threads may call the work function; they
// draw tasks from one counter. All sums are in single precision.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

// What a caller fills in. Strides count elements, of batch and token; the last axis is dense.
struct ChunkLaunch {
  const void *gate, *value, *quadratic_query, *linear_query, *quadratic_key, *linear_key;
  const float *bias;     // [C, C], null for none
  const uint8_t *shown;  // [batch, tokens], null if all are
  void *out;
  float *state;  // [batch, N, F], the sum of kᵀ v over all chunks before, and then over these too; null for none of both
  int64_t batch, tokens;
  int64_t before;  // chunks before
  int64_t gate_stride[2], value_stride[2], quadratic_query_stride[2], linear_query_stride[2], quadratic_key_stride[2],
      linear_key_stride[2], out_stride[2];
  int64_t threads;  // how many will call the work function
  char *workspace;  // plan() bytes, by the caller, 64-byte aligned
  int64_t next;     // the task that nobody has taken yet
  int64_t workers;  // how many have begun
};

// Vectors of 8 floats in the compiler's own notation; intrinsics only where it has no word for it.
constexpr int W = 8;
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(16)));
typedef vf vf_anywhere __attribute__((aligned(1), may_alias));
typedef vh vh_anywhere __attribute__((aligned(1), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
// A function of its own, of which callers know nothing: GCC 12 takes some that write vectors through pointers to floats
// for functions without effects, and drops the calls.
#if defined(__clang__)
#define OUTLINE static __attribute__((noinline))
#else
#define OUTLINE static __attribute__((noipa))
#endif

INLINE vf load(const float *p) { return *(const vf_anywhere *)p; }
INLINE void store(float *p, vf x) { *(vf_anywhere *)p = x; }
INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x}; }
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

constexpr vi LANES = {0, 1, 2, 3, 4, 5, 6, 7};

// Lane l of FIRST_s is a[l] where l has bit s clear, else b[l - s]; of SECOND_s a[l + s], else b[l].
#define FIRST_4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define SECOND_4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#define FIRST_2(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define SECOND_2(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define FIRST_1(a, b) SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
#define SECOND_1(a, b) SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15)

// Rows of a W x W block become its columns.
INLINE void transpose(vf *rows) {
  { vf a = rows[0], b = rows[4]; rows[0] = FIRST_4(a, b); rows[4] = SECOND_4(a, b); }
  { vf a = rows[1], b = rows[5]; rows[1] = FIRST_4(a, b); rows[5] = SECOND_4(a, b); }
  { vf a = rows[2], b = rows[6]; rows[2] = FIRST_4(a, b); rows[6] = SECOND_4(a, b); }
  { vf a = rows[3], b = rows[7]; rows[3] = FIRST_4(a, b); rows[7] = SECOND_4(a, b); }
  { vf a = rows[0], b = rows[2]; rows[0] = FIRST_2(a, b); rows[2] = SECOND_2(a, b); }
  { vf a = rows[1], b = rows[3]; rows[1] = FIRST_2(a, b); rows[3] = SECOND_2(a, b); }
  { vf a = rows[4], b = rows[6]; rows[4] = FIRST_2(a, b); rows[6] = SECOND_2(a, b); }
  { vf a = rows[5], b = rows[7]; rows[5] = FIRST_2(a, b); rows[7] = SECOND_2(a, b); }
  { vf a = rows[0], b = rows[1]; rows[0] = FIRST_1(a, b); rows[1] = SECOND_1(a, b); }
  { vf a = rows[2], b = rows[3]; rows[2] = FIRST_1(a, b); rows[3] = SECOND_1(a, b); }
  { vf a = rows[4], b = rows[5]; rows[4] = FIRST_1(a, b); rows[5] = SECOND_1(a, b); }
  { vf a = rows[6], b = rows[7]; rows[6] = FIRST_1(a, b); rows[7] = SECOND_1(a, b); }
}

// Lane l of the result is the sum over the lanes of rows[l].
INLINE vf sums(vf *rows) {
  rows[0] = FIRST_4(rows[0], rows[4]) + SECOND_4(rows[0], rows[4]);
  rows[1] = FIRST_4(rows[1], rows[5]) + SECOND_4(rows[1], rows[5]);
  rows[2] = FIRST_4(rows[2], rows[6]) + SECOND_4(rows[2], rows[6]);
  rows[3] = FIRST_4(rows[3], rows[7]) + SECOND_4(rows[3], rows[7]);
  rows[0] = FIRST_2(rows[0], rows[2]) + SECOND_2(rows[0], rows[2]);
  rows[1] = FIRST_2(rows[1], rows[3]) + SECOND_2(rows[1], rows[3]);
  rows[0] = FIRST_1(rows[0], rows[1]) + SECOND_1(rows[0], rows[1]);
  return rows[0];
}

INLINE float sum_of(vf x) {
  x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += SHUFFLE(x, x, 2, 3, 0, 1, 2, 3, 0, 1);
  x += SHUFFLE(x, x, 1, 0, 1, 0, 1, 0, 1, 0);
  return x[0];
}

INLINE float largest_of(vf x) {
  x = larger(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = larger(x, SHUFFLE(x, x, 2, 3, 0, 1, 2, 3, 0, 1));
  x = larger(x, SHUFFLE(x, x, 1, 0, 1, 0, 1, 0, 1, 0));
  return x[0];
}

// One storage type and its way into and out of vectors of single precision.
typedef uint16_t T;
INLINE vf widen(const T *p) { return (vf)(__builtin_convertvector(*(const vh_anywhere *)p, vu) << 16); }
INLINE void narrow(T *p, vf x) {
  vu bits = (vu)x;
  vu even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vu kept = (vu)((x != x) ? (vi)(vu{} + 0x7fc0u) : (vi)even);
  *(vh_anywhere *)p = __builtin_convertvector(kept, vh);
}
INLINE float scalar(T x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The same for a part of a vector; what lies beyond is neither read nor written, and reads as 0.
INLINE vf widen_part(const T *p, int count) {
  T copy[W] = {};
  memcpy(copy, p, (size_t)count * sizeof(T));
  return widen(copy);
}
INLINE void narrow_part(T *p, vf x, int count) {
  T copy[W];
  narrow(copy, x);
  memcpy(p, copy, (size_t)count * sizeof(T));
}

// c += a * b, where an operand's 32-bit unit is one float.
INLINE vf multiply(vf c, vf a, vf b) {
  return a * b + c;
}

// c[R x 16N] = or += a[R x depth] * b[depth x 16N], in units; accumulators never leave registers. From one depth of a to
// the next are STEP units: more than one where a is transposed.
template <int R, int N, int STEP>
INLINE void product_block(const float *a, int lda, const float *b, int64_t ldb, int depth, float *c, int ldc,
                          bool add) {
  vf sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = vf{};
  for (int d = 0; d < depth; ++d) {
    vf right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load(b + d * ldb + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf left = splat(a[r * lda + d * STEP]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = multiply(sum[r][n], left, right[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float *place = c + r * ldc + n * W;
      store(place, add ? load(place) + sum[r][n] : sum[r][n]);  // tile by tile: long sums keep their precision
    }
}

template <int N, int STEP>
static __attribute__((noinline)) void product(int rows, const float *a, int lda, const float *b, int64_t ldb,
                                              int depth, float *c, int ldc, bool add) {
  switch (rows) {
    case 1: product_block<1, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 2: product_block<2, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 3: product_block<3, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 4: product_block<4, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 5: product_block<5, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
    case 6: product_block<6, N, STEP>(a, lda, b, ldb, depth, c, ldc, add); break;
  }
}

// c[rows x 16V] = or += a * b, rows <= MR, V vectors wide.
template <int V, int STEP = 1>
INLINE void product_wide(int rows, const float *a, int lda, const float *b, int64_t ldb, int depth, float *c, int ldc,
                         bool add) {
  constexpr int N = V < 2 ? V : 2, REST = V % N;
  for (int n = 0; n + N <= V; n += N) product<N, STEP>(rows, a, lda, b + n * W, ldb, depth, c + n * W, ldc, add);
  if (REST) product<(REST ? REST : 1), STEP>(rows, a, lda, b + (V - REST) * W, ldb, depth, c + (V - REST) * W, ldc, add);
}

constexpr int N = 6, F = 20, C = 7;  // features of queries and of values, tokens of a chunk
constexpr int MR = 6, V = 2, PANEL = V * W;  // rows and columns that are held in registers
constexpr int PANELS = (F + PANEL - 1) / PANEL;
constexpr int padded(int n) { return (n + W - 1) / W * W; }
constexpr int NP = padded(N), CP = padded(C), LEFT = CP + NP;

// What a worker works on, most of it of one chunk.
struct Scratch {
  alignas(64) float keys[NP][CP];   // transposed: the quadratic ones, then the linear ones
  alignas(64) float left[C][LEFT];  // squared scores, then linear queries
  alignas(64) float queries[MR][NP];
  alignas(64) float values[C][PANEL];
  alignas(64) float out[MR][PANEL];
  alignas(64) float state[PANELS][N][PANEL];  // the sum of kᵀ v
};

struct Task {
  int64_t batch, first, end;  // panels
  Scratch *scratch;
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void widen_row(float *to, const T *row, int size) {
  for (int u = 0; u < size; u += W) store(to + u, size - u >= W ? widen(row + u) : widen_part(row + u, size - u));
}

INLINE bool is_shown(const ChunkLaunch &launch, int64_t batch, int64_t token) {
  return !launch.shown || launch.shown[batch * launch.tokens + token];
}

// A chunk's keys, transposed; those that are not there are zero, and with `hide` those that are hidden too.
OUTLINE void hold_keys(const ChunkLaunch &launch, const Task &task, const T *key, int64_t step, int64_t begin, int count,
                       bool hide) {
  for (int j = 0; j < CP; j += W)
    for (int u = 0; u < NP; u += W) {
      vf block[W];
      for (int i = 0; i < W; ++i) {
        const T *row = key + (j + i) * step + u;
        const bool there = j + i < count && !(hide && !is_shown(launch, task.batch, begin + j + i));
        block[i] = !there ? vf{} : N - u >= W ? widen(row) : widen_part(row, N - u);
      }
      transpose(block);
      for (int i = 0; i < W; ++i) store(&task.scratch->keys[u + i][j], block[i]);
    }
}

INLINE void hold_linear_keys(const ChunkLaunch &launch, const Task &task, int64_t begin, int count) {
  const int64_t step = launch.linear_key_stride[1];
  const T *key = (const T *)launch.linear_key + task.batch * launch.linear_key_stride[0] + begin * step;
  hold_keys(launch, task, key, step, begin, count, true);
}

// Squared positive scores of rows [first, first + rows) of the chunk, as far as they are used.
INLINE void weigh(const ChunkLaunch &launch, const Task &task, int64_t begin, int first, int rows, int reach) {
  Scratch &s = *task.scratch;
  for (int r = 0; r < rows; ++r) {
    float *line = s.left[first + r];
    const float *bias = launch.bias ? launch.bias + (int64_t)(first + r) * C : nullptr;
    const int end = first + r + 1;
    for (int j = 0; j < reach; j += W) {
      vf score = load(line + j) * splat(1.0f / C);
      if (bias) {
        alignas(64) float part[W] = {};
        if (C - j < W) memcpy(part, bias + j, (size_t)(C - j) * sizeof(float));
        score += load(C - j < W ? part : bias + j);
      }
      score = score > 0 ? score * score : score == score ? vf{} : score;
      store(line + j, LANES + j < end ? score : vf{});
    }
    if (!launch.shown) continue;
    for (int j = 0; j < reach; ++j)
      if (!is_shown(launch, task.batch, begin + j)) line[j] = 0.0f;
  }
}

// What stands on the left of all products with a chunk's values and with the sum.
OUTLINE void hold_left(const ChunkLaunch &launch, const Task &task, int64_t number, int64_t begin, int count) {
  Scratch &s = *task.scratch;
  const float divisor = (float)C * (float)(number > 0 ? number : 1);
  const float share = 1.0f / divisor;
  const int64_t step = launch.quadratic_query_stride[1], linear_step = launch.linear_query_stride[1], key_step = launch.quadratic_key_stride[1];
  const T *query = (const T *)launch.quadratic_query + task.batch * launch.quadratic_query_stride[0] + begin * step;
  const T *linear = (const T *)launch.linear_query + task.batch * launch.linear_query_stride[0] + begin * linear_step;
  const T *key = (const T *)launch.quadratic_key + task.batch * launch.quadratic_key_stride[0] + begin * key_step;
  hold_keys(launch, task, key, key_step, begin, count, false);
  for (int first = 0; first < count; first += MR) {
    const int rows = (int)least(MR, count - first), reach = first + rows;
    for (int r = 0; r < rows; ++r) {
      float *queries = &s.left[first + r][CP];
      widen_row(s.queries[r], query + (first + r) * step, N);
      widen_row(queries, linear + (first + r) * linear_step, N);
      for (int u = 0; u < NP; u += W) store(queries + u, load(queries + u) * splat(share));
    }
    int j = 0;
    for (; j + PANEL <= CP && j < reach; j += PANEL)
      product<V, 1>(rows, s.queries[0], NP, &s.keys[0][j], CP, N, s.left[first] + j, LEFT, false);
    for (; j < reach; j += W) product<1, 1>(rows, s.queries[0], NP, &s.keys[0][j], CP, N, s.left[first] + j, LEFT, false);
    weigh(launch, task, begin, first, rows, reach);
  }
}

INLINE int width_of(int64_t panel) { return (int)least(PANEL, F - panel * PANEL); }

OUTLINE void hold_values(const ChunkLaunch &launch, const Task &task, int64_t panel, int64_t begin, int count) {
  const int64_t step = launch.value_stride[1];
  const T *value = (const T *)launch.value + task.batch * launch.value_stride[0] + begin * step + panel * PANEL;
  const int width = width_of(panel);
  float *to = task.scratch->values[0];
  for (int j = 0; j < count; ++j, value += step, to += PANEL) {
    if (width == PANEL) for (int n = 0; n < V; ++n) store(to + n * W, widen(value + n * W));
    else for (int n = 0; n < V; ++n) store(to + n * W, width > n * W ? widen_part(value + n * W, (int)least(W, width - n * W)) : vf{});
  }
}

// Scores times values and linear queries times the sum, times the gate: one panel of a chunk's result.
OUTLINE void mix_panel(const ChunkLaunch &launch, const Task &task, int64_t panel, bool sums, int64_t begin, int count) {
  Scratch &s = *task.scratch;
  const int64_t gate_step = launch.gate_stride[1], out_step = launch.out_stride[1];
  const int width = width_of(panel);
  const T *gate = (const T *)launch.gate + task.batch * launch.gate_stride[0] + begin * gate_step + panel * PANEL;
  T *out = (T *)launch.out + task.batch * launch.out_stride[0] + begin * out_step + panel * PANEL;
  for (int first = 0; first < count; first += MR) {
    const int rows = (int)least(MR, count - first), reach = first + rows;
    for (int r = 0; r < rows; ++r) {  // rows lie far apart
      __builtin_prefetch(gate + r * gate_step);
      __builtin_prefetch(out + r * out_step, 1);
    }
    product<V, 1>(rows, s.left[first], LEFT, s.values[0], PANEL, reach, s.out[0], PANEL, false);
    if (sums) product<V, 1>(rows, &s.left[first][CP], LEFT, s.state[panel][0], PANEL, N, s.out[0], PANEL, true);
    for (int r = 0; r < rows; ++r, gate += gate_step, out += out_step)
      for (int e = 0; e < width; e += W) {
        const vf mixed = load(&s.out[r][e]);
        if (width - e >= W) narrow(out + e, mixed * widen(gate + e));
        else narrow_part(out + e, mixed * widen_part(gate + e, width - e), width - e);
      }
  }
}

// A chunk's kᵀ v joins the sum.
OUTLINE void join_panel(const Task &task, int64_t panel, int count) {
  Scratch &s = *task.scratch;
  for (int f = 0; f < N; f += MR)
    product<V, 1>((int)least(MR, N - f), s.keys[f], CP, s.values[0], PANEL, count, s.state[panel][f], PANEL, true);
}

// The sum over the chunks before, from the caller or back to it.
OUTLINE void hold_state(const ChunkLaunch &launch, const Task &task, bool back) {
  for (int64_t panel = task.first; launch.state && panel < task.end; ++panel)
    for (int n = 0; n < N; ++n) {
      float *theirs = launch.state + (task.batch * N + n) * F + panel * PANEL, *ours = task.scratch->state[panel][n];
      memcpy(back ? theirs : ours, back ? ours : theirs, (size_t)width_of(panel) * sizeof(float));
    }
}

INLINE void run_task(const ChunkLaunch &launch, const Task &task) {
  memset(task.scratch->state, 0, sizeof task.scratch->state);
  hold_state(launch, task, false);
  for (int walk = 1; walk < 2; ++walk)
    for (int64_t number = 0; number * C < launch.tokens; ++number) {
      const int64_t begin = number * C;
      const int count = (int)least(C, launch.tokens - begin);
      const int64_t before = launch.before + number;
      const bool joins = launch.state || begin + count < launch.tokens, sums = before > 0;
      if (walk) hold_left(launch, task, before, begin, count);
      if (joins) hold_linear_keys(launch, task, begin, count);
      for (int64_t panel = task.first; panel < task.end; ++panel) {
        hold_values(launch, task, panel, begin, count);
        if (walk) mix_panel(launch, task, panel, sums, begin, count);
        if (joins) join_panel(task, panel, count);
      }
    }
  hold_state(launch, task, true);
}

// How many panels a task has: all of a sequence's, unless sequences do not come out even on the threads. Scores are
// worked out once for each task.
INLINE int64_t panels_of(const ChunkLaunch &launch) {
  return launch.batch % launch.threads == 0 ? PANELS : (PANELS + launch.threads - 1) / launch.threads;
}

INLINE int64_t slices_of(const ChunkLaunch &launch) {
  const int64_t each = panels_of(launch);
  return (PANELS + each - 1) / each;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The bytes of workspace that `launch->threads` threads take.
EXPORT int64_t chunks_f20_n6_c7_causal_bf16_avx2_0fedb046_plan(ChunkLaunch *launch) {
  if (launch->threads < 1) launch->threads = 1;
  const int64_t tasks = launch->batch * slices_of(*launch);
  if (launch->threads > tasks) launch->threads = tasks < 1 ? 1 : tasks;
  launch->next = launch->workers = 0;
  return launch->threads * (int64_t)sizeof(Scratch);
}

// Before the first call of the work function, once the workspace is there.
EXPORT void chunks_f20_n6_c7_causal_bf16_avx2_0fedb046_start(ChunkLaunch *launch) { launch->next = launch->workers = 0; }

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void chunks_f20_n6_c7_causal_bf16_avx2_0fedb046_work(void *pointer) {
  ChunkLaunch &launch = *(ChunkLaunch *)pointer;
  const int64_t worker = __atomic_fetch_add(&launch.workers, 1, __ATOMIC_RELAXED);
  if (worker >= launch.threads) return;
  const int64_t each = panels_of(launch), slices = slices_of(launch);
  for (;;) {
    const int64_t number = __atomic_fetch_add(&launch.next, 1, __ATOMIC_RELAXED);
    if (number >= launch.batch * slices) return;
    const int64_t first = number % slices * each;
    run_task(launch, {number / slices, first, least(first + each, PANELS), (Scratch *)launch.workspace + worker});
  }
}

// start() and work() on `threads` threads of the caller's pool, which is entered as OpenMP's runtime is; on this
// thread alone if `pool` is null.
EXPORT void chunks_f20_n6_c7_causal_bf16_avx2_0fedb046_run(ChunkLaunch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  chunks_f20_n6_c7_causal_bf16_avx2_0fedb046_start(launch);
  if (pool && launch->threads > 1) pool(chunks_f20_n6_c7_causal_bf16_avx2_0fedb046_work, launch, (unsigned)launch->threads, 0);
  else chunks_f20_n6_c7_causal_bf16_avx2_0fedb046_work(launch);
}
