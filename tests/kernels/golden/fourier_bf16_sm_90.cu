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

__device__ __forceinline__ void dft_6(Complex *x) {
  Complex y[6];
  {
    Complex part[3] = {x[0], x[2], x[4]};
    dft_3(part);
    y[0] = part[0];
    y[2] = part[1];
    y[4] = part[2];
  }
  {
    Complex part[3] = {x[1], x[3], x[5]};
    dft_3(part);
    y[1] = part[0];
    y[3] = times(part[1], {0.5000000000000001f, -0.8660254037844386f});
    y[5] = times(part[2], {-0.4999999999999998f, -0.8660254037844387f});
  }
  dft_2(y + 0);
  dft_2(y + 2);
  dft_2(y + 4);
  x[0] = y[0];
  x[3] = y[1];
  x[1] = y[2];
  x[4] = y[3];
  x[2] = y[4];
  x[5] = y[5];
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
__device__ __forceinline__ unsigned place_tokens(unsigned at) { return (at + at / 4u) * 8u; }

// Grid: ceil(rows / 50); block: 25 pairs of 5 threads.
extern "C" __global__ void __launch_bounds__(125) fourier_cuda_s24_d20_bias_bf16_sm_90_2f696500_features(
    const Half *x, long long stride_b, long long stride_s, unsigned *middle, int rows, int tokens) {
  let_next_start();
  const unsigned thread = threadIdx.x % 5u, pair = threadIdx.x / 5u;
  Complex *points = (Complex *)dynamic_shared() + pair * 25u;
  const int left = 2 * (int)(blockIdx.x * 25u + pair), right = left + 1;
  const int near = left < rows ? left : rows - 1, far = right < rows ? right : rows - 1;
  const Half *a = x + near / tokens * stride_b + near % tokens * stride_s;
  const Half *b = x + far / tokens * stride_b + far % tokens * stride_s;
  a += thread, b += thread;
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
  if (left >= rows) return;
  const bool both = right < rows;
  unsigned *upper = middle + (long long)left * 16 + thread;
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    const unsigned d = thread + n * 5u;
    if (n == 2 && d >= 11u) break;
    const Complex here = points[place_features(d)], there = points[d ? place_features(20u - d) : 0u];
    upper[n * 5] = narrow2(0.5f * (here.re + there.re), 0.5f * (here.im - there.im));
    if (both)
      upper[n * 5 + 16] = narrow2(0.5f * (here.im + there.im), 0.5f * (there.re - here.re));
  }
}

// Grid: (batch, ceil(11 / 8)); block: 8 columns of 4 threads.
extern "C" __global__ void __launch_bounds__(32) fourier_cuda_s24_d20_bias_bf16_sm_90_2f696500_tokens(
    const unsigned *middle, const Half *bias, Half *out) {
  const unsigned column = threadIdx.x % 8u, thread = threadIdx.x / 8u;
  Complex *points = (Complex *)dynamic_shared() + column;
  const unsigned d = blockIdx.y * 8u + column, opposite = 20u - d;
  const bool inside = d < 11u, mirrored = d > 0 && 2 * d < 20u;
  const float bias_here = inside ? widen(bias[d]) : 0.0f;
  const float bias_there = mirrored ? widen(bias[opposite]) : 0.0f;
  const unsigned *from = middle + (long long)blockIdx.x * 384 + (thread * 16u + d);
  Half *to = out + (long long)blockIdx.x * 480;
  const auto load = [&](int at) {
    const unsigned both = from[at * 16];
    return Complex{widen_low(both), widen_high(both)};
  };
  wait_for_inputs();
  {  // radix 4
    Complex x[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const unsigned j = thread + n * 4u;
      if (j < 6u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = load(n * 4 + i * 6);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const unsigned j = thread + n * 4u;
      if (j < 6u) {
      dft_4(x[n]);
      Complex *to = points + place_tokens(j * 4u);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i * 8] = x[n][i];
      }
    }
    __syncthreads();
  }
  {  // radix 6
    Complex x[1][6];
#pragma unroll
    for (int n = 0; n < 1; ++n) {
      const unsigned j = thread + n * 4u;
      const Complex *from = points + place_tokens(j);
#pragma unroll
      for (int i = 0; i < 6; ++i) x[n][i] = from[i * 40];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 1; ++n) {
      const unsigned j = thread + n * 4u;
      const unsigned k = j % 4u;
      turn<6>(x[n], (float)k * -0.2617993877991494f);
      dft_6(x[n]);
      if (inside) {
        Half *at = to + (j * 20u + d);
#pragma unroll
        for (int i = 0; i < 6; ++i)
          at[i * 80] = narrow(x[n][i].re + bias_here);
      }
      if (mirrored) {
        Half *at = to + ((24u - j) * 20u + opposite);
        if (j == 0u) *(at - 480) = narrow(x[n][0].re + bias_there);
        else *at = narrow(x[n][0].re + bias_there);
#pragma unroll
        for (int i = 1; i < 6; ++i)
          at[-i * 80] = narrow(x[n][i].re + bias_there);
      }

    }
  }
}
