// fourier_cuda_s24_d20_bias_bf16_sm_90_2f696500: written by rewriter from a specification; edit the template, not this file.
//   hidden = 20
//   hartley = False
//   gain = False
//   bias = True
typedef unsigned short Half;  // the bits of a bfloat16

#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char dynamic_pool[];
__device__ __forceinline__ unsigned char *dynamic_shared() { return dynamic_pool; }
__device__ __forceinline__ float widen(Half x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ float widen_low(unsigned x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float widen_high(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ unsigned narrow2(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
#endif
__device__ __forceinline__ Half narrow(float x) { return (Half)narrow2(x, 0.0f); }

struct Complex {
  float re, im;
};

__device__ __forceinline__ Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ __forceinline__ Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
__device__ __forceinline__ Complex minus_i(Complex a) { return {a.im, -a.re}; }
__device__ __forceinline__ Complex scaled(Complex a, float by) { return {a.re * by, a.im * by}; }
__device__ __forceinline__ Complex times(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

__device__ __forceinline__ void dft_1(Complex *) {}

__device__ __forceinline__ void dft_2(Complex *x) {
  const Complex a = x[0], b = x[1];
  x[0] = a + b, x[1] = a - b;
}

__device__ __forceinline__ void dft_3(Complex *x) {
  const Complex sum = x[1] + x[2], turn = minus_i(scaled(x[1] - x[2], 0.866025403784438647f));
  const Complex middle = x[0] - scaled(sum, 0.5f);
  x[0] = x[0] + sum, x[1] = middle + turn, x[2] = middle - turn;
}

__device__ __forceinline__ void dft_4(Complex *x) {
  const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = minus_i(x[1] - x[3]);
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
}

__device__ __forceinline__ void dft_5(Complex *x) {
  constexpr float C1 = 0.309016994374947424f, C2 = -0.809016994374947424f;
  constexpr float S1 = 0.951056516295153572f, S2 = 0.587785252292473129f;
  const Complex a = x[1] + x[4], b = x[2] + x[3], c = x[1] - x[4], d = x[2] - x[3];
  const Complex one = x[0] + scaled(a, C1) + scaled(b, C2), two = x[0] + scaled(a, C2) + scaled(b, C1);
  const Complex p = minus_i(scaled(c, S1) + scaled(d, S2)), q = minus_i(scaled(c, S2) - scaled(d, S1));
  x[0] = x[0] + a + b, x[1] = one + p, x[2] = two + q, x[3] = two - q, x[4] = one - p;
}

__device__ __forceinline__ void dft_8(Complex *x) {
  Complex y[8];
  {
    Complex part[4] = {x[0], x[2], x[4], x[6]};
    dft_4(part);
    y[0] = part[0];
    y[2] = part[1];
    y[4] = part[2];
    y[6] = part[3];
  }
  {
    Complex part[4] = {x[1], x[3], x[5], x[7]};
    dft_4(part);
    y[1] = part[0];
    y[3] = times(part[1], {0.7071067811865476f, -0.7071067811865475f});
    y[5] = minus_i(part[2]);
    y[7] = times(part[3], {-0.7071067811865475f, -0.7071067811865476f});
  }
  dft_2(y + 0);
  dft_2(y + 2);
  dft_2(y + 4);
  dft_2(y + 6);
  x[0] = y[0];
  x[4] = y[1];
  x[1] = y[2];
  x[5] = y[3];
  x[2] = y[4];
  x[6] = y[5];
  x[3] = y[6];
  x[7] = y[7];
}

// Inputs 1, 2, ... of a pass are turned by an angle and its multiples, which are made from one sine and cosine.
template <int points>
__device__ __forceinline__ void turn(Complex *x, float angle) {
  Complex root[points];
  root[1] = {__cosf(angle), __sinf(angle)};
#pragma unroll
  for (int i = 1; i < points; ++i) {
    if (i > 1) root[i] = times(root[i / 2], root[i - i / 2]);
    x[i] = times(x[i], root[i]);
  }
}

// Where a point lies: a gap after every few keeps threads out of each other's banks.
__device__ __forceinline__ unsigned place_features(unsigned at) { return at + at / 4u; }

// Grid: batch * 3; block: 4 pairs of tokens, 5 threads each.
extern "C" __global__ void __launch_bounds__(20) fourier_cuda_s24_d20_bias_bf16_sm_90_2f696500_features(
    const Half *x, long long stride_b, long long stride_s, unsigned *middle) {
  let_next_start();
  const unsigned thread = threadIdx.x % 5u, pair = threadIdx.x / 5u;
  const unsigned batch = blockIdx.x / 3u, first = blockIdx.x % 3u;
  Complex *bundle = (Complex *)dynamic_shared(), *roots = bundle + 100;
  Complex *points = bundle + pair * 25u;
  for (unsigned k = threadIdx.x; k < 8u; k += 20u) {
    const int turn = (int)(first * k), near = turn > 12 ? turn - 24 : turn;
    const float angle = (float)near * -0.2617993877991494f;
    roots[k] = {__cosf(angle), __sinf(angle)};
  }
  const unsigned left = 2 * pair, right = left + 1;
  const Half *a = x + batch * stride_b + (first + left * 3u) * stride_s + thread;
  const Half *b = x + batch * stride_b + (first + right * 3u) * stride_s + thread;
  const auto load = [&](int at) { return Complex{widen(a[at]), widen(b[at])}; };
  {  // radix 4
    Complex x[1][4];
#pragma unroll
    for (int n = 0; n < 1; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = load(n * 5 + i * 5);
    }
#pragma unroll
    for (int n = 0; n < 1; ++n) {
      const unsigned j = thread + n * 5u;
      dft_4(x[n]);
      Complex *to = points + place_features(j * 4u);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i * 1] = x[n][i];
    }
    __syncthreads();
  }
  {  // radix 5
    Complex x[1][5];
#pragma unroll
    for (int n = 0; n < 1; ++n) {
      const unsigned j = thread + n * 5u;
      if (j < 4u) {
      const Complex *from = points + place_features(j);
#pragma unroll
      for (int i = 0; i < 5; ++i) x[n][i] = from[i * 5];
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 1; ++n) {
      const unsigned j = thread + n * 5u;
      if (j < 4u) {
      const unsigned k = j % 4u;
      turn<5>(x[n], (float)k * -0.3141592653589793f);
      dft_5(x[n]);
      Complex *to = points + place_features(j);
#pragma unroll
      for (int i = 0; i < 5; ++i) to[i * 5] = x[n][i];

      }
    }
  }
  __syncthreads();
  unsigned *to = middle + (long long)(batch * 24u + first) * 32;
  for (unsigned d = threadIdx.x; d < 11u; d += 20u) {
    const Complex *one = bundle + place_features(d), *other = bundle + (d ? place_features(20u - d) : 0u);
    Complex y[8];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const Complex here = one[n * 25], there = other[n * 25];
      y[2 * n] = {0.5f * (here.re + there.re), 0.5f * (here.im - there.im)};
      y[2 * n + 1] = {0.5f * (here.im + there.im), 0.5f * (there.re - here.re)};
    }
    dft_8(y);
    to[d] = narrow2(y[0].re, y[0].im);
#pragma unroll
    for (int k = 1; k < 8; ++k) {
      const Complex turned = times(y[k], roots[k]);
      to[k * 96 + d] = narrow2(turned.re, turned.im);
    }
  }
}

// Grid: ceil(groups * 11 / 128), groups = batch * 8; block: 128 columns, one to a thread.
extern "C" __global__ void __launch_bounds__(128) fourier_cuda_s24_d20_bias_bf16_sm_90_2f696500_tokens(
    const unsigned *middle, const Half *bias, Half *out, int groups) {
  const unsigned index = blockIdx.x * 128u + threadIdx.x, group = index / 11u, d = index % 11u;
  if (group >= (unsigned)groups) return;
  const unsigned batch = group / 8u, first = group % 8u, opposite = 20u - d;
  const bool inside = d < 11u, mirrored = d > 0 && 2 * d < 20u;
  const float bias_here = inside ? widen(bias[d]) : 0.0f;
  const float bias_there = mirrored ? widen(bias[opposite]) : 0.0f;
  Half *to = out + (long long)batch * 480;

  const unsigned *from = middle + (long long)group * 96 + d;
  constexpr unsigned j = 0, n = 0;
  Complex x[1][3];
  wait_for_inputs();
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const unsigned both = from[i * 32];
    x[0][i] = {widen_low(both), widen_high(both)};
  }
  dft_3(x[0]);
      // results of the frequencies j + i * 1 of the rest, i < 3
      if (inside) {
        Half *at = to + ((first + j * 8u) * 20u + d);
#pragma unroll
        for (int i = 0; i < 3; ++i) at[i * 160] = narrow(x[n][i].re + bias_here);
      }
      if (mirrored) {
        Half *at = to + ((24u - first - j * 8u) * 20u + opposite);
        at[first + j ? 0 : -480] = narrow(x[n][0].re + bias_there);
#pragma unroll
        for (int i = 1; i < 3; ++i) at[-i * 160] = narrow(x[n][i].re + bias_there);
      }

}
