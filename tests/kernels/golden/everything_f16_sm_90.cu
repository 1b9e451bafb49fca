// gqa_cuda_h6_kv3_d96_e128_causal_bias_softcap_sinks_zero_f16_sm_90_62f473f1: written by rewriter from a specification; edit the template, not this file.
//   heads = 6
//   kv_heads = 3
//   head_dim = 96
//   value_dim = 128
//   scale = 0.1
//   causal = True
//   bias = True
//   softcap = 3.0
//   masked_rows_are_zero = True
//   sinks = True
typedef unsigned short Half;  // the bits of a float16

#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char dynamic_pool[];
__device__ __forceinline__ unsigned char *dynamic_shared() { return dynamic_pool; }
__device__ __forceinline__ float widen(Half x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
  return value;
}
__device__ __forceinline__ float widen_low(unsigned x) { return widen((Half)x); }
__device__ __forceinline__ float widen_high(unsigned x) { return widen((Half)(x >> 16)); }
__device__ __forceinline__ unsigned narrow2(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
#endif
__device__ __forceinline__ Half narrow(float x) { return (Half)narrow2(x, 0.0f); }

#ifdef __CUDACC__
// 16 bytes, or zeros in their place; the reader is the thread that copied.
__device__ __forceinline__ void copy_16(uint4 *to, const void *from, bool present) {
  asm volatile(
      "{\n .reg .u64 wide;\n .reg .u32 place;\n cvta.to.shared.u64 wide, %0;\n cvt.u32.u64 place, wide;\n"
      " cp.async.cg.shared.global [place], [%1], 16, %2;\n}\n" ::"l"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_end_here() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until no more than `later` groups of copies are under way.
template <int later>
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory"); }
// sums [16, 8] += a [16, 16] b [16, 8], spread over a warp as the instruction m16n8k16 wants it.
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{ %0, %1, %2, %3 }, { %4, %5, %6, %7 }, { %8, %9 }, { %0, %1, %2, %3 };"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float exp2_of(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
#endif

constexpr int GROUP = 2, ROWS = 16, KEYS = 16, WARPS = 4, STAGES = 3;
constexpr int KEY_PARTS = 3;     // 32 features each
constexpr int VALUE_PARTS = 2;  // 64 features each
constexpr int COPIES = 2 * KEY_PARTS + 4 * VALUE_PARTS;  // of 16 bytes, of a thread for one tile of keys and values
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
// What a score weighs once the largest is taken off.
__device__ __forceinline__ float weight(float score, float top) { return exp2_of((score - top) * LOG2_E); }
// The largest score as something to subtract: rows that have seen nothing yet have none.
__device__ __forceinline__ float subtrahend(float top) { return top == minus_infinity() ? 0.0f : top; }
__device__ __forceinline__ float over_quad(float x, bool add) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, mask);
    x = add ? x + other : fmaxf(x, other);
  }
  return x;
}

// Copies one tile's keys and values, 16 from `start` on, to where this thread will read them.
__device__ __forceinline__ void fetch(
    uint4 *slot, const Half *k, const Half *v, int start, int last, int stride_kt, int stride_vt, int group, int part) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int key = start + 8 * n + group;
    const Half *from = k + (long long)(key < last ? key : last - 1) * stride_kt + 8 * part;
#pragma unroll
    for (int c = 0; c < KEY_PARTS; ++c) copy_16(slot + (n * KEY_PARTS + c) * 32, from + 32 * c, key < last);
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int key = start + 2 * part + n % 2 + n / 2 * 8;
    const Half *from = v + (long long)(key < last ? key : last - 1) * stride_vt + 8 * group;
#pragma unroll
    for (int c = 0; c < VALUE_PARTS; ++c)
      copy_16(slot + (2 * KEY_PARTS + n * VALUE_PARTS + c) * 32, from + 64 * c, key < last);
  }
}

// Grid: (splits, K/V heads, batch * tiles of 16 rows); a split takes `share` keys.
// Writes sums [B * tiles, KV, splits, 16, E] and state [B * tiles, KV, splits, 16, 2]: the largest score, the sum of weights.
extern "C" __global__ void __launch_bounds__(32 * WARPS) gqa_cuda_h6_kv3_d96_e128_causal_bias_softcap_sinks_zero_f16_sm_90_62f473f1_split(
    const Half *q, const Half *k, const Half *v, long long stride_qb, int stride_qh, int stride_qs, long long stride_kb,
    int stride_kh, int stride_kt, long long stride_vb, int stride_vh, int stride_vt,
    const void *bias_at, long long stride_bb, int stride_bh, int stride_bs, int stride_bt, int boolean,
    float *sums, float *state, int queries, int keys, int share) {
  let_next_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  const int tiles = (queries * GROUP + ROWS - 1) / ROWS, head = blockIdx.y, tile = blockIdx.z % tiles;
  const long long batch = blockIdx.z / tiles;
  const int first = blockIdx.x * share;
  int last = first + share < keys ? first + share : keys;
  // of the two rows that this lane has scores of: query, head, and whether there is such a row
  int rows[2], heads[2];
  bool inside[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int index = tile * ROWS + 8 * n + group;
    rows[n] = index / GROUP, heads[n] = head * GROUP + index % GROUP, inside[n] = rows[n] < queries;
  }
  {
    const int index = tile * ROWS + ROWS - 1, final = index / GROUP < queries ? index / GROUP : queries - 1;
    const int row = final, end = row + (keys - queries) + 1;
    last = end < last ? end : last;
  }
  unsigned left[2 * KEY_PARTS][4];
#pragma unroll
  for (int c = 0; c < KEY_PARTS; ++c) {
    uint4 own[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      own[n] = {0u, 0u, 0u, 0u};
      if (inside[n])
        own[n] = *(const uint4 *)(q + batch * stride_qb + (long long)heads[n] * stride_qh +
                                  (long long)rows[n] * stride_qs + 32 * c + 8 * part);
    }
    left[2 * c][0] = own[0].x, left[2 * c][1] = own[1].x, left[2 * c][2] = own[0].y, left[2 * c][3] = own[1].y;
    left[2 * c + 1][0] = own[0].z, left[2 * c + 1][1] = own[1].z;
    left[2 * c + 1][2] = own[0].w, left[2 * c + 1][3] = own[1].w;
  }
  k += batch * stride_kb + (long long)head * stride_kh;
  v += batch * stride_vb + (long long)head * stride_vh;
  uint4 *slots = (uint4 *)dynamic_shared() + warp * STAGES * COPIES * 32 + lane;
  float total[2] = {0.0f, 0.0f}, top[2] = {minus_infinity(), minus_infinity()};
  float out[8 * VALUE_PARTS][4];
#pragma unroll
  for (int j = 0; j < 8 * VALUE_PARTS; ++j) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;

  const int step = WARPS * KEYS, begin = first + warp * KEYS;
#pragma unroll
  for (int n = 0; n < STAGES - 1; ++n) {
    if (begin + n * step < last)
      fetch(slots + n * COPIES * 32, k, v, begin + n * step, last, stride_kt, stride_vt, group, part);
    copies_end_here();
  }
  int place = 0;
  for (int start = begin; start < last; start += step) {
    const int ahead = start + (STAGES - 1) * step, free = place ? place - 1 : STAGES - 1;
    if (ahead < last) fetch(slots + free * COPIES * 32, k, v, ahead, last, stride_kt, stride_vt, group, part);
    copies_end_here();
    wait_for_copies<STAGES - 1>();
    const uint4 *slot = slots + place * COPIES * 32;
    place = place + 1 < STAGES ? place + 1 : 0;

    float scores[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
      for (int c = 0; c < KEY_PARTS; ++c) {
        const uint4 right = slot[(n * KEY_PARTS + c) * 32];
        multiply(scores[n], left[2 * c], right.x, right.y);
        multiply(scores[n], left[2 * c + 1], right.z, right.w);
      }
    }
    float peak[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = start + 8 * n + 2 * part + i % 2;
        const int row = rows[i / 2];
        float score = scores[n][i];
        float bias = 0.0f;
        if (inside[i / 2] && key < last) {
          const long long at = batch * stride_bb + (long long)heads[i / 2] * stride_bh + (long long)row * stride_bs +
                               (long long)key * stride_bt;
          bias = boolean ? (((const unsigned char *)bias_at)[at] ? 0.0f : minus_infinity())
                         : widen(((const Half *)bias_at)[at]);
        }
        score = (tanhf(score * 0x1.1111111111111p-5f) * 0x1.8000000000000p+1f + bias);
        if (key >= last || key > row + (keys - queries)) score = minus_infinity();
        scores[n][i] = score;
        peak[i / 2] = fmaxf(peak[i / 2], score);
      }
    float shrink[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      peak[n] = over_quad(peak[n], false);
      shrink[n] = weight(top[n], subtrahend(peak[n]));
      top[n] = peak[n], total[n] *= shrink[n];
    }
    unsigned weights[4];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float one = weight(scores[n][2 * i], subtrahend(top[i])), other = weight(scores[n][2 * i + 1], subtrahend(top[i]));
        total[i] += one + other;
        weights[2 * n + i] = narrow2(one, other);
      }
#pragma unroll
    for (int j = 0; j < 8 * VALUE_PARTS; ++j)
      out[j][0] *= shrink[0], out[j][1] *= shrink[0], out[j][2] *= shrink[1], out[j][3] *= shrink[1];
#pragma unroll
    for (int c = 0; c < VALUE_PARTS; ++c) {
      uint4 own[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) own[n] = slot[(2 * KEY_PARTS + n * VALUE_PARTS + c) * 32];
      const unsigned words[4][4] = {
          {own[0].x, own[0].y, own[0].z, own[0].w}, {own[1].x, own[1].y, own[1].z, own[1].w},
          {own[2].x, own[2].y, own[2].z, own[2].w}, {own[3].x, own[3].y, own[3].z, own[3].w}};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int w = j / 2;
        const unsigned near = j % 2 ? words[0][w] >> 16 | (words[1][w] & 0xffff0000u)
                                    : (words[0][w] & 0xffffu) | words[1][w] << 16;
        const unsigned far = j % 2 ? words[2][w] >> 16 | (words[3][w] & 0xffff0000u)
                                   : (words[2][w] & 0xffffu) | words[3][w] << 16;
        multiply(out[8 * c + j], weights, near, far);
      }
    }
  }
  wait_for_copies<0>();

  // warps' states become the block's: 16 x E sums of each warp, then their largest scores and sums of weights
  __syncthreads();
  float *kept = (float *)dynamic_shared(), *kept_top = kept + WARPS * ROWS * 128, *kept_total = kept_top + WARPS * ROWS;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int row = 8 * n + group;
    total[n] = over_quad(total[n], true);
    if (part == 0) kept_top[warp * ROWS + row] = top[n], kept_total[warp * ROWS + row] = total[n];
#pragma unroll
    for (int c = 0; c < VALUE_PARTS; ++c)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          kept[(warp * ROWS + row) * 128 + 64 * c + 8 * (2 * part + i) + j] = out[8 * c + j][2 * n + i];
  }
  __syncthreads();
  const long long line = (((long long)blockIdx.z * gridDim.y + head) * gridDim.x + blockIdx.x) * ROWS;
  for (int at = threadIdx.x; at < ROWS * 128; at += 32 * WARPS) {
    const int row = at / 128, value = at % 128;
    if ((tile * ROWS + row) / GROUP >= queries) break;
    float most = minus_infinity(), weights = 0.0f, sum = 0.0f;
#pragma unroll
    for (int n = 0; n < WARPS; ++n) most = fmaxf(most, kept_top[n * ROWS + row]);
#pragma unroll
    for (int n = 0; n < WARPS; ++n) {
      const float share_of = weight(kept_top[n * ROWS + row], subtrahend(most));
      weights += kept_total[n * ROWS + row] * share_of;
      sum += kept[(n * ROWS + row) * 128 + value] * share_of;
    }
    sums[(line + row) * 128 + value] = sum;
    if (value == 0) state[2 * (line + row)] = most, state[2 * (line + row) + 1] = weights;
  }
}

// Grid: (rows of a K/V head, K/V heads, batch); block: 128 features. Adds the splits up.
extern "C" __global__ void __launch_bounds__(128) gqa_cuda_h6_kv3_d96_e128_causal_bias_softcap_sinks_zero_f16_sm_90_62f473f1_join(
    const float *sums, const float *state,
    const Half *sinks, int sink_columns, long long stride_sb, int stride_sh, int stride_ss, int stride_sn,
    Half *out, long long stride_ob, int stride_oh, int stride_os, int queries, int splits) {
  const int index = blockIdx.x, value = threadIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const int row = index / GROUP, own_head = head * GROUP + index % GROUP;
  const int tiles = (queries * GROUP + ROWS - 1) / ROWS;
  const long long line = ((((long long)batch * tiles + index / ROWS) * gridDim.y + head) * splits) * ROWS + index % ROWS;
  float top = minus_infinity(), total = 0.0f, sum = 0.0f;
  wait_for_inputs();
  for (int n = 0; n < sink_columns; ++n) {
    const float sink = widen(sinks[batch * stride_sb + (long long)own_head * stride_sh + (long long)row * stride_ss +
                                   (long long)n * stride_sn]);
    const float peak = fmaxf(top, sink);
    total = total * weight(top, subtrahend(peak)) + weight(sink, subtrahend(peak));
    top = peak;
  }
  for (int n = 0; n < splits; ++n) {
    const long long at = line + (long long)n * ROWS;
    const float other = state[2 * at], peak = fmaxf(top, other);
    const float mine = weight(top, subtrahend(peak)), theirs = weight(other, subtrahend(peak));
    total = total * mine + state[2 * at + 1] * theirs;
    sum = sum * mine + sums[at * 128 + value] * theirs;
    top = peak;
  }
  const float none = 0.0f;
  out[batch * stride_ob + (long long)own_head * stride_oh + (long long)row * stride_os + value] =
      narrow(total == 0.0f ? none : sum / total);
}
