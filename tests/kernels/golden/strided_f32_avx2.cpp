// gqa_h4_kv2_d33_e17_causal_sparse1_f32_avx2_4e9f5107: written by rewriter from a specification; edit the template, not this file.
//   heads = 4
//   kv_heads = 2
//   head_dim = 33
//   value_dim = 17
//   scale = 0.3
//   causal = True
//   bias = False
//   softcap = None
//   masked_rows_are_zero = False
//   sinks = False
//   pattern = [{'reach': 7, 'block': 1, 'sinks': 0, 'period': 1, 'first': 0, 'last': 0, 'stride': 6, 'ordered': True}]
//   dtype = float32, instructions = avx2
//
// Flash attention over key tiles: a task takes a few query rows of one key/value head, walks over that head's keys
// once for all of them, and keeps a running maximum, sum and output per row. With few tasks the keys are split too,
// and the last task of a split merges. Rows are query heads of one group times queries, so that K and V are read once
// for the whole group. Any number of threads may call the work function; they draw tasks from one counter.
//
// The pattern is followed without looking at keys that nobody sees. A task's rows have one sight. Their near keys are
// one span; all others that they may see, far apart as they lie, are gathered into tiles. Where keys whole strides
// away are seen, the task's queries are whole strides apart too, so that these keys serve all of them, and near keys
// are taken query by query.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

// What a caller fills in. Strides count elements; the last axis of q, k, v and out is dense.
struct Launch {
  const void *q, *k, *v, *bias, *sinks;
  void *out;
  int64_t batch, queries, keys, sink_columns;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, token
  int64_t bias_stride[4], sink_stride[4];                         // batch, head, query, key; 0 where broadcast
  int64_t bias_is_boolean;
  int64_t threads;  // how many will call the work function
  // What plan() decides.
  int64_t splits, groups, head_blocks, query_blocks, query_rows;
  char *workspace;  // plan() bytes, by the caller, 64-byte aligned
  int64_t next;     // the task that nobody has taken yet
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

// 2^x for x <= 0: a polynomial of degree 5 on [-1/2, 1/2]; 0 below 2^-126, NaN for NaN.
INLINE vf exp2_of(vf x) {
  const vf lowest = splat(-126.0f), magic = splat(12582912.0f);
  vf y = x < lowest ? lowest : x;
  vf whole = (y + magic) - magic;
  vf part = y - whole;
  vf power = splat(0.001327647152f);
  power = power * part + splat(0.009675541331f);
  power = power * part + splat(0.05550713275f);
  power = power * part + splat(0.2402211972f);
  power = power * part + splat(0.6931469671f);
  power = power * part + splat(1.000000072f);
  vi shift = __builtin_convertvector(whole, vi) << 23;
  vf found = (vf)((vi)power + shift);
  return x < lowest ? vf{} : found;
}

// One storage type and its way into and out of vectors of single precision.
typedef float T;
INLINE vf widen(const T *p) { return load(p); }
INLINE void narrow(T *p, vf x) { store(p, x); }
INLINE float scalar(T x) { return x; }

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

constexpr int KV_HEADS = 2, GROUP = 2, D = 33, E = 17;
constexpr int ROWS = 128;       // of a task, at most
constexpr int KT = 64;     // keys of a tile
constexpr int MR = 6;   // rows that are held in registers
constexpr int SCORE_VECTORS = 8, OUT_VECTORS = 3;
constexpr int FEW_ROWS = 4;  // up to here a dot product per key beats transposing keys
constexpr int PAIR = 1;    // numbers per 32-bit unit of a product's operands
constexpr int D_UNITS = (D + PAIR * W - 1) / (PAIR * W) * W, E_PADDED = (E + W - 1) / W * W;
constexpr int KT_UNITS = KT / PAIR;
constexpr bool V_IN_PLACE = false;  // values need no conversion, only their rows
constexpr bool V_LAID_OUT = true;  // some tiles of values are copied
constexpr float NONE = -__builtin_inff();
constexpr float LOG2_E = 1.4426950408889634f;

// Which keys a query sees, by positions; those of queries may be negative where there are more of them than keys.
struct Sight {
  int64_t reach, block, sinks, period, first, last, stride;
  bool ordered;  // no key behind the query
};
constexpr Sight SIGHTS[] = {
    {7, 1, 0, 1, 0, 0, 6, true},
};
constexpr bool SYMMETRIC[] = {false};
constexpr int NEVER = 2147483647;
constexpr int APART = 1;                       // heads this far apart have the same sight
constexpr int SHARED = (GROUP + APART - 1) / APART;  // heads of a group that have one, at most
constexpr int WIDE = 2 * W;                       // keys that are worked on at a time within a tile

INLINE int64_t floor_of(int64_t x, int64_t by) { return x / by - (x % by < 0); }

INLINE bool seen_by_all(const Sight &sight, int64_t p) {
  const int64_t within = p - floor_of(p, sight.period) * sight.period;
  return p < sight.sinks || (sight.first <= within && within < sight.last);
}

// The keys [low, high) near position p, its reach and its block, which both hold p; and the end of all that it may see.
INLINE void see(const Sight &sight, int64_t p, int64_t keys, int &low, int &high, int &limit) {
  const int64_t end = sight.ordered ? (p + 1 < 0 ? 0 : p + 1) : keys, block = floor_of(p, sight.block) * sight.block;
  int64_t from = p - sight.reach + 1 < block ? p - sight.reach + 1 : block;
  int64_t to = p + sight.reach > block + sight.block ? p + sight.reach : block + sight.block;
  if (SYMMETRIC[&sight - SIGHTS] && seen_by_all(sight, p)) from = 0, to = keys;  // who is seen by all sees all
  if (from < 0) from = 0;
  if (to > end) to = end;
  low = (int)from, high = (int)(to > from ? to : from), limit = (int)end;
}

// The first key from p on that queries like that at `position` may see wherever they are.
INLINE int64_t next_apart(const Sight &sight, int64_t position, int64_t p) {
  if (seen_by_all(sight, p)) return p;
  int64_t found = NEVER;
  if (sight.first < sight.last) {
    const int64_t begin = p / sight.period * sight.period + sight.first;
    found = begin < p ? begin + sight.period : begin;
  }
  if (sight.stride != NEVER) {
    const int64_t ahead = position - p, next = position - floor_of(ahead, sight.stride) * sight.stride;
    if (next < found) found = next;
  }
  return found;
}

// Into how many classes queries fall whose members are whole strides apart.
INLINE int64_t classes_of(const Sight &sight, int64_t queries) {
  if (sight.stride == NEVER || queries < 1) return 1;
  return sight.stride < queries ? sight.stride : queries;
}

// How many keys a query sees, about.
INLINE int64_t often(const Sight &sight, int64_t keys) {
  const int64_t near = 2 * sight.reach + sight.block + sight.sinks;
  return near + keys / sight.period * (sight.last - sight.first) + keys / sight.stride;
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

// One vector of units of a row of `size` numbers, from unit `unit` on; zeros behind its end.
INLINE vf units(const T *row, int unit, int size) {
  const int left = size - unit;
  return left >= W ? widen(row + unit) : widen_part(row + unit, left > 0 ? left : 0);
}

// Rows first, first + apart, ... of a task.
struct Rows {
  int first, apart, count;
  INLINE_MEMBER int operator[](int r) const { return first + r * apart; }
};

// What a task works on; it lives on its thread's stack.
struct Tile {
  alignas(64) float q[ROWS][D_UNITS];
  alignas(64) float out[ROWS][E_PADDED];
  alignas(64) float keys[D_UNITS][KT];
  alignas(64) float values[V_LAID_OUT ? KT_UNITS : 1][E_PADDED];
  alignas(64) float scores[MR][KT];
  alignas(64) float weights[MR][KT_UNITS];
  alignas(64) float largest[ROWS];
  alignas(64) float total[ROWS][W];  // lane by lane
  int64_t row[ROWS];                 // the query's number
  alignas(64) int place[KT];               // positions of the tile's keys, ascending; NEVER behind the last
  int low[ROWS], high[ROWS], limit[ROWS];  // of a row: its near keys, and the end of what its order shows
  int rows;
};

// Rows are queries of heads, head by head.
struct Task {
  int64_t batch, kv_head, head, query;
  int heads, queries;
  const Sight *sight;
  int64_t step;  // from query to query
  INLINE_MEMBER int64_t head_of(int r) const { return head + r / queries * APART; }
  INLINE_MEMBER int64_t query_of(int r) const { return query + r % queries * step; }
};

INLINE const T *query_at(const Launch &launch, const Task &task, int r) {
  return (const T *)launch.q + task.batch * launch.q_stride[0] + task.head_of(r) * launch.q_stride[1] +
         task.query_of(r) * launch.q_stride[2];
}

OUTLINE void lay_out_values(Tile &tile, const T *v, int64_t stride, int count) {
  for (int j = 0; j < count; ++j)
#pragma GCC unroll 16
    for (int e = 0; e < E_PADDED; e += W) store(&tile.values[j][e], units(v + (int64_t)tile.place[j] * stride, e, E));
}


INLINE void transpose_keys(Tile &tile, const T *k, int64_t stride, int count) {
  for (int j = 0; j < KT; j += W) {
    const int there = count - j;
    if (there <= 0) break;
    for (int u = 0; u < D_UNITS; u += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = i < there ? units(k + (int64_t)tile.place[j + i] * stride, u, D) : vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(&tile.keys[u + i][j], block[i]);
    }
  }
}

// Scores of up to FEW_ROWS rows straight from the keys [from, to) as they lie. Rows are not unrolled: each reads the
// keys anew, from the nearest cache, and one function for each number of them took longer to build than all the rest.
// Inline, since GCC 12 takes it for a pure function in bfloat16 and drops the call.
INLINE void dot_keys(Tile &tile, Rows rows, const T *k, int64_t stride, int from, int to) {
  for (int j = from / W * W; j < to; j += W) {
    const int there = to - j;
    for (int r = 0; r < rows.count; ++r) {
      vf sum[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const T *key = k + (int64_t)tile.place[j + (i < there ? i : 0)] * stride;
        sum[i] = vf{};
#pragma GCC unroll 8
        for (int u = 0; u < D_UNITS; u += W) sum[i] = multiply(sum[i], load(&tile.q[rows[r]][u]), units(key, u, D));
      }
      store(&tile.scores[r][j], sums(sum));
    }
  }
}

// Scores of keys [from, to) become weights; the running maximum, sum and output follow. The tile has `count` keys,
// which are near ones or those apart.
INLINE void weigh(const Launch &launch, Tile &tile, Rows rows, bool near, int from, int to, int count) {
  for (int r = 0; r < rows.count; ++r) {
    const int at = rows[r];
    float *line = tile.scores[r];
    const vi low = vi{} + tile.low[at], high = vi{} + tile.high[at], limit = vi{} + tile.limit[at];
    const int visible = count;
    vf top = splat(NONE);
    for (int j = from; j < to; j += W) {
      const int left = visible - j;
      if (left <= 0) {
        store(line + j, splat(NONE));
        continue;
      }
      vf score = load(line + j);
      score = score * splat(0x1.bb322796769fdp-2f);
      const vi place = *(const vi *)(tile.place + j), nearby = (place >= low) & (place < high);
      score = (near ? nearby : ~nearby & (place < limit)) ? score : splat(NONE);
      store(line + j, score);
      top = larger(score, top);
    }
    const float before = tile.largest[at], here = largest_of(top), after = here > before ? here : before;
    const vf base = splat(after == NONE ? 0.0f : after);
    float *sum = tile.total[at], *out = tile.out[at];
    if (after > before) {
      const vf left = splat(before), keep = exp2_of(left - base);
      store(sum, load(sum) * keep);
      for (int e = 0; e < E_PADDED; e += W) store(out + e, load(out + e) * keep);
      tile.largest[at] = after;
    }
    vf total = load(sum);
    for (int j = from; j < to; j += PAIR * W) {
      const vf one = exp2_of(load(line + j) - base);
      total += one;
      store(&tile.weights[r][j], one);
    }
    store(sum, total);
  }
}

// The tile's keys [from, to) that some of these rows see; none where from >= to.
INLINE void shown(const Tile &tile, Rows rows, bool near, int count, int &from, int &to) {
  const int start = tile.place[0], end = tile.place[count - 1] + 1;
  from = count, to = 0;
  for (int r = 0; r < rows.count; ++r) {
    const int low = tile.low[rows[r]], high = tile.high[rows[r]];
    if (near) {
      const int first = low > start ? low - start : 0, last = high < end ? high - start : count;
      if (first < last) from = first < from ? first : from, to = last > to ? last : to;
    } else if (start < tile.limit[rows[r]] && (start < low || end > high)) {
      from = 0, to = count;
    }
  }
}

// One key tile for some rows of the task.
OUTLINE void attend(const Launch &launch, Tile &tile, Rows rows, const T *k, const T *v,
                                             bool near, int count) {
  const int64_t k_stride = launch.k_stride[2], v_stride = launch.v_stride[2];
  const bool few = rows.count <= FEW_ROWS;
  const bool in_place = V_IN_PLACE && near;
  bool ready = false;
  const int blocks = (rows.count + MR - 1) / MR;
  for (int b = 0; b < blocks; ++b) {
    const int before = rows.count * b / blocks;
    const Rows block = {rows[before], rows.apart, rows.count * (b + 1) / blocks - before};
    int first, last;
    shown(tile, block, near, count, first, last);
    if (first >= last) continue;
    if (!ready) {
      if (!few) transpose_keys(tile, k, k_stride, count);
      if (!in_place) lay_out_values(tile, v, v_stride, count);
      ready = true;
    }
    const int from = first / WIDE * WIDE, to = (last + WIDE - 1) / WIDE * WIDE, depth = last - from;
    const int lda = D_UNITS * rows.apart;
    if (few) dot_keys(tile, block, k, k_stride, first, last);
    else
      for (int j = from; j < to; j += WIDE)
        product_wide<WIDE / W>(block.count, tile.q[block.first], lda, tile.keys[0] + j, KT, D_UNITS, tile.scores[0] + j, KT, false);
    weigh(launch, tile, block, near, from, to, count);
    const float *values = in_place ? (const float *)(const void *)(v + tile.place[0] * v_stride) : tile.values[0];
    const int64_t ldv = in_place ? v_stride : E_PADDED;
    product_wide<OUT_VECTORS>(block.count, tile.weights[0] + from / PAIR, KT_UNITS, values + from / PAIR * ldv, ldv,
                              (depth + PAIR - 1) / PAIR, tile.out[block.first], E_PADDED * rows.apart, true);
  }
}

INLINE float total_of(const Tile &tile, int r) {
  return sum_of(load(tile.total[r]));
}

INLINE void begin(const Launch &launch, Tile &tile, const Task &task, [[maybe_unused]] bool with_sinks) {
  const int64_t batch = task.batch;
  tile.rows = task.heads * task.queries;
  for (int r = 0; r < tile.rows; ++r) {
    [[maybe_unused]] const int64_t h = task.head_of(r), i = task.query_of(r);
    
    for (int u = 0; u < D_UNITS; u += W) store(&tile.q[r][u], units(query_at(launch, task, r), u, D));
    tile.row[r] = i;
    tile.largest[r] = NONE;
    store(tile.total[r], vf{});
    memset(tile.out[r], 0, sizeof tile.out[r]);
    see(*task.sight, i + (launch.keys - launch.queries), launch.keys, tile.low[r], tile.high[r], tile.limit[r]);
  }
}

INLINE void write_row(T *out, const float *sum, float total, int64_t keys) {
  // a row that sees none of the keys has no weights; where there are no keys, the sum over them is zero
  const vf share = splat(keys == 0 ? 0.0f : 1.0f / total);
  for (int e = 0; e < E_PADDED; e += W) {
    const vf x = load(sum + e) * share;
    if (E - e >= W) narrow(out + e, x);
    else narrow_part(out + e, x, E - e);
  }
}

struct Partial {
  float largest[ROWS], total[ROWS];
  float out[ROWS][E_PADDED];
};

INLINE T *out_row(const Launch &launch, const Tile &tile, const Task &task, int r) {
  return (T *)launch.out + task.batch * launch.out_stride[0] + task.head_of(r) * launch.out_stride[1] +
         tile.row[r] * launch.out_stride[2];
}

// Brings the splits of one group of rows together, in their order.
INLINE void merge(const Launch &launch, const Tile &tile, const Partial *parts, const Task &task) {
  for (int r = 0; r < tile.rows; ++r) {
    float after = NONE, total = 0.0f;
    for (int64_t s = 0; s < launch.splits; ++s)
      if (parts[s].largest[r] > after) after = parts[s].largest[r];
    const vf base = splat(after == NONE ? 0.0f : after);
    alignas(64) float sum[E_PADDED] = {};
    for (int64_t s = 0; s < launch.splits; ++s) {
      const vf left = splat(parts[s].largest[r]), keep = exp2_of(left - base);
      total += parts[s].total[r] * keep[0];
      for (int e = 0; e < E_PADDED; e += W) store(sum + e, load(sum + e) + load(&parts[s].out[r][e]) * keep);
    }
    write_row(out_row(launch, tile, task, r), sum, total, launch.keys);
  }
}

// The keys [from, to) that the task's rows see.
INLINE void attend_all(const Launch &launch, Tile &tile, const Task &task, const T *k, const T *v, int64_t from, int64_t to) {
  const bool by_query = task.sight->stride != NEVER;
  for (int n = 0; n < (by_query ? task.queries : 1); ++n) {
    const Rows rows = by_query ? Rows{n, task.queries, task.heads} : Rows{0, 1, tile.rows};
    int64_t low = to, high = from;
    for (int r = 0; r < rows.count; ++r) {
      if (tile.low[rows[r]] >= tile.high[rows[r]]) continue;
      if (tile.low[rows[r]] < low) low = tile.low[rows[r]];
      if (tile.high[rows[r]] > high) high = tile.high[rows[r]];
    }
    if (low < from) low = from;
    if (high > to) high = to;
    for (int64_t start = low; start < high; start += KT) {
      const int count = (int)(high - start < KT ? high - start : KT);
      for (int j = 0; j < KT; ++j) tile.place[j] = j < count ? (int)start + j : NEVER;
      attend(launch, tile, rows, k, v, true, count);
    }
  }
  int count = 0;
  int64_t end = 0;
  for (int r = 0; r < tile.rows; ++r)
    if (tile.limit[r] > end) end = tile.limit[r];
  if (end > to) end = to;
  const int64_t position = task.query + (launch.keys - launch.queries);
  for (int64_t p = next_apart(*task.sight, position, from); p < end; p = next_apart(*task.sight, position, p + 1)) {
    tile.place[count++] = (int)p;
    if (count < KT) continue;
    attend(launch, tile, Rows{0, 1, tile.rows}, k, v, false, count);
    count = 0;
  }
  if (!count) return;
  for (int j = count; j < KT; ++j) tile.place[j] = NEVER;
  attend(launch, tile, Rows{0, 1, tile.rows}, k, v, false, count);
}

// The part of a task's number that says which of its rows; false if there are none.
INLINE bool cut(const Launch &launch, int64_t head_block, int64_t query_block, Task &task) {
  const int64_t sights = APART < GROUP ? APART : GROUP, number = head_block % sights;
  task.sight = &SIGHTS[(task.kv_head * GROUP + number) % APART];
  const int64_t shared = (GROUP - number + APART - 1) / APART, blocks = launch.head_blocks / sights;
  const int64_t classes = classes_of(*task.sight, launch.queries), residue = query_block % classes;
  const int64_t queries = (launch.queries - residue + classes - 1) / classes, before = query_block / classes * launch.query_rows;
  const int64_t per_block = (SHARED + blocks - 1) / blocks, earlier = head_block / sights * per_block;
  task.step = classes > 1 ? task.sight->stride : 1;
  task.query = residue + before * task.step;
  task.head = task.kv_head * GROUP + number + earlier * APART;
  task.queries = (int)(queries - before < launch.query_rows ? queries - before : launch.query_rows);
  task.heads = (int)(shared - earlier < per_block ? shared - earlier : per_block);
  return task.heads > 0 && task.queries > 0;
}

INLINE void run_task(Launch &launch, Tile &tile, int64_t number) {
  const int64_t split = number % launch.splits, group = number / launch.splits;
  int64_t rest = group;
  // long rows first: the last queries of a causal order see the most keys
  const int64_t query_block = launch.query_blocks - 1 - rest % launch.query_blocks;
  rest /= launch.query_blocks;
  const int64_t head_block = rest % launch.head_blocks;
  rest /= launch.head_blocks;
  Task task;
  task.kv_head = rest % KV_HEADS, task.batch = rest / KV_HEADS;
  if (!cut(launch, head_block, query_block, task)) return;
  begin(launch, tile, task, split == 0);
  const T *k = (const T *)launch.k + task.batch * launch.k_stride[0] + task.kv_head * launch.k_stride[1];
  const T *v = (const T *)launch.v + task.batch * launch.v_stride[0] + task.kv_head * launch.v_stride[1];
  attend_all(launch, tile, task, k, v, launch.keys * split / launch.splits, launch.keys * (split + 1) / launch.splits);
  if (launch.splits == 1) {
    for (int r = 0; r < tile.rows; ++r)
      write_row(out_row(launch, tile, task, r), tile.out[r], total_of(tile, r), launch.keys);
    return;
  }
  int64_t *arrived = (int64_t *)launch.workspace + group;
  Partial *parts = (Partial *)(launch.workspace + (launch.groups * 8 + 63) / 64 * 64) + group * launch.splits;
  Partial &mine = parts[split];
  memcpy(mine.largest, tile.largest, sizeof mine.largest);
  for (int r = 0; r < tile.rows; ++r) mine.total[r] = total_of(tile, r);
  memcpy(mine.out, tile.out, (size_t)tile.rows * sizeof tile.out[0]);
  if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) == launch.splits)
    merge(launch, tile, parts, task);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Decides how the work is cut for `launch->threads`; returns the bytes of workspace it takes, 0 if none.
EXPORT int64_t gqa_h4_kv2_d33_e17_causal_sparse1_f32_avx2_4e9f5107_plan(Launch *launch) {
  int64_t longest_run = 0, most_seen = 0;
  for (const Sight &sight : SIGHTS) {
    const int64_t classes = classes_of(sight, launch->queries), run = (launch->queries + classes - 1) / classes;
    longest_run = run > longest_run ? run : longest_run;
    most_seen = often(sight, launch->keys) > most_seen ? often(sight, launch->keys) : most_seen;
  }
  launch->query_rows = longest_run < ROWS ? longest_run : ROWS;
  if (launch->query_rows < 1) launch->query_rows = 1;
  const int64_t most = ROWS / launch->query_rows, heads = most < SHARED ? most : SHARED;
  launch->head_blocks = (SHARED + heads - 1) / heads;
  launch->head_blocks *= APART < GROUP ? APART : GROUP;
  launch->query_blocks = 0;
  for (const Sight &sight : SIGHTS) {
    const int64_t classes = classes_of(sight, launch->queries), run = (launch->queries + classes - 1) / classes;
    const int64_t blocks = classes * ((run + launch->query_rows - 1) / launch->query_rows);
    launch->query_blocks = blocks > launch->query_blocks ? blocks : launch->query_blocks;
  }
  launch->groups = launch->batch * KV_HEADS * launch->head_blocks * launch->query_blocks;
  const int64_t wanted = launch->threads > 1 ? 4 * launch->threads : 1;
  const int64_t longest = most_seen / 256;
  int64_t splits = launch->groups > 0 ? (wanted + launch->groups - 1) / launch->groups : 1;
  if (splits > longest) splits = longest;
  launch->splits = splits < 1 ? 1 : splits;
  launch->next = 0;
  if (launch->splits == 1) return 0;
  return (launch->groups * 8 + 63) / 64 * 64 + launch->groups * launch->splits * (int64_t)sizeof(Partial);
}

// Before the first call of the work function, once the workspace is there.
EXPORT void gqa_h4_kv2_d33_e17_causal_sparse1_f32_avx2_4e9f5107_start(Launch *launch) {
  launch->next = 0;
  if (launch->splits > 1) memset(launch->workspace, 0, (size_t)launch->groups * 8);
}

// Takes tasks until none is left; `launch->threads` threads may do so at once.
EXPORT void gqa_h4_kv2_d33_e17_causal_sparse1_f32_avx2_4e9f5107_work(void *pointer) {
  Launch &launch = *(Launch *)pointer;
  Tile tile;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&launch.next, 1, __ATOMIC_RELAXED);
    if (task >= launch.groups * launch.splits) return;
    run_task(launch, tile, task);
  }
}

// start() and work() on `threads` threads of the caller's pool, which is entered as OpenMP's runtime is; on this
// thread alone if `pool` is null.
EXPORT void gqa_h4_kv2_d33_e17_causal_sparse1_f32_avx2_4e9f5107_run(Launch *launch, void (*pool)(void (*)(void *), void *, unsigned, unsigned)) {
  gqa_h4_kv2_d33_e17_causal_sparse1_f32_avx2_4e9f5107_start(launch);
  if (pool && launch->threads > 1) pool(gqa_h4_kv2_d33_e17_causal_sparse1_f32_avx2_4e9f5107_work, launch, (unsigned)launch->threads, 0);
  else gqa_h4_kv2_d33_e17_causal_sparse1_f32_avx2_4e9f5107_work(launch);
}
