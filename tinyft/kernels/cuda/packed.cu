// A weight W (out, K) in groups along its rows:  w = s (level(q) − z) + m.        y = x Wᵀ
//
// codes (bytes, out): a stream of BITS bits a code down each column, the first code in the lowest bits.  level(q) is table[q], or q if
// there is no table.  scale, shift (groups, out): s and m; zero_codes: a stream of z, or null, and then z is `zero` everywhere.
// T is the type of x and of dense weights, S that of scale and shift.  LANES neighbouring columns, 4 or 1, belong to a thread, which
// reads them at once; LANES divides out.
#include "rows.cuh"
#ifndef BITS
#define BITS 4
#endif
#ifndef LANES
#define LANES 1
#endif
#define THREADS 256
#define WARPS (THREADS / 32)
#define CODE ((1u << BITS) - 1)
#if LANES == 4
typedef unsigned Bytes;                                  // a byte of each column
#else
typedef unsigned char Bytes;
#endif

// The codes of 8 k ... 8 k + 7 of LANES columns: BITS bytes of each.  Bytes past the end of the stream are 0.
struct Octet { Bytes byte[BITS + 1]; };

__device__ Octet read_octet(const unsigned char* codes, int k, int column, int out, int bytes) {
  Octet some;
  for (int i = 0; i < BITS; i++) some.byte[i] = BITS * k + i < bytes ? *(const Bytes*)(codes + (size_t)(BITS * k + i) * out + column) : 0;
  some.byte[BITS] = 0;
  return some;
}

__device__ unsigned code(const Octet& some, int j, int lane) {           // code j of column `lane` of an octet
  int at = BITS * j / 8, in_byte = BITS * j % 8;
  unsigned low = some.byte[at] >> 8 * lane & 255, high = some.byte[at + 1] >> 8 * lane & 255;
  return (low | high << 8) >> in_byte & CODE;
}

__device__ unsigned stream_code(const unsigned char* stream, int k, int column, int out) {     // code k of one column
  int at = BITS * k / 8, in_byte = BITS * k % 8;
  unsigned both = stream[(size_t)at * out + column];
  if (in_byte + BITS > 8) both |= stream[(size_t)(at + 1) * out + column] << 8;
  return both >> in_byte & CODE;
}

// The whole number q as float.  A float of 2^23 + q ends with the bits of q, so nothing is converted: a conversion is slow on a device.
__device__ float whole(unsigned q) { return __uint_as_float(0x4b000000u | q) - 8388608.0f; }

__device__ float level(unsigned q, const float* table) { return table ? table[q] : whole(q); }

__device__ float zero_point(const unsigned char* zero_codes, float zero, int group, int column, int out) {
  return zero_codes ? whole(stream_code(zero_codes, group, column, out)) : zero;
}

// y[part] (rows of x, out): the products with the codes of a part of K.  blockIdx.x: 32 LANES columns; y: a row of x; z: a part.
// A warp has `octets` octets of them, and each of its threads LANES columns.  The sums over the codes of a group come first; s, z and m
// act on them where a group ends.
extern "C" __global__ void __launch_bounds__(THREADS) packed_matvec(const unsigned char* codes, const S* scale, const unsigned char* zero_codes,
    float zero, const S* shift, const float* table, const T* x, float* y, int out, int K, int group, int octets) {
  __shared__ float sums[WARPS][32 * LANES];
  __shared__ float levels[1 << BITS];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = (blockIdx.x * 32 + lane) * LANES;
  if (table) for (int q = threadIdx.x; q < 1 << BITS; q += THREADS) levels[q] = table[q];
  __syncthreads();
  float total[LANES] = {}, dot[LANES] = {}, plain = 0;   // plain: Σ x over the codes that dot has
  int first = (blockIdx.z * WARPS + warp) * octets, last = min(first + octets, (K + 7) / 8), bytes = (K * BITS + 7) / 8;
  int next = 8 * first / group * group + group;          // the code at which another group begins
  if (column < out) for (int at = first; at < last; at++) {
    Octet some = read_octet(codes, at, column, out, bytes);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      int k = 8 * at + j;
      if (k < K) {
        float xk = (float)x[(size_t)blockIdx.y * K + k];
        plain += xk;
        for (int l = 0; l < LANES; l++) dot[l] += xk * level(code(some, j, l), table ? levels : nullptr);
      }
      bool ends = k + 1 == next || (j == 7 && at + 1 == last);
      if (ends) {
        int b = min(k, K - 1) / group;
        for (int l = 0; l < LANES; l++) {
          size_t of = (size_t)b * out + column + l;
          float z = zero_point(zero_codes, zero, b, column + l, out), m = shift ? (float)shift[of] : 0;
          total[l] += (float)scale[of] * (dot[l] - z * plain) + m * plain;
          dot[l] = 0;
        }
        plain = 0;
        next += group;
      }
    }
  }
  for (int l = 0; l < LANES; l++) sums[warp][lane * LANES + l] = total[l];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * LANES; i += THREADS) {
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += sums[w][i];
    int c = blockIdx.x * 32 * LANES + i;
    if (c < out) y[((size_t)blockIdx.z * gridDim.y + blockIdx.y) * out + c] = sum;
  }
}

// y (n,) = Σ of parts (count, n), in their order.
extern "C" __global__ void packed_sum(const float* parts, T* y, int count, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    float sum = 0;
    for (int p = 0; p < count; p++) sum += parts[(size_t)p * n + i];
    y[i] = (T)sum;
  }
}

// W[first : first + n]ᵀ, (K, n): the dense weights of some rows, for a product of dense matrices.  A thread to an octet of a column.
// order, input_scale (K,), or null: code k stands for the input order[k], and its weights are divided by that input's scale.
extern "C" __global__ void packed_columns(const unsigned char* codes, const S* scale, const unsigned char* zero_codes, float zero,
    const S* shift, const float* table, const int* order, const float* input_scale, T* W, int out, int K, int group, int first, int n) {
  int bytes = (K * BITS + 7) / 8;
  long long all = (long long)((K + 7) / 8) * n;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < all; i += gridDim.x * (long long)blockDim.x) {
    int at = i / n, column = first + i % n;
    unsigned char byte[BITS + 1];
    for (int b = 0; b < BITS; b++) byte[b] = BITS * at + b < bytes ? codes[(size_t)(BITS * at + b) * out + column] : 0;
    byte[BITS] = 0;
    int held = -1;                                       // the group of s, z and m
    float s = 0, z = 0, m = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      int k = 8 * at + j;
      if (k >= K) break;
      int input = order ? order[k] : k;
      if (k / group != held) {
        held = k / group;
        size_t of = (size_t)held * out + column;
        s = (float)scale[of];
        z = zero_point(zero_codes, zero, held, column, out);
        m = shift ? (float)shift[of] : 0;
      }
      unsigned q = (byte[BITS * j / 8] | byte[BITS * j / 8 + 1] << 8) >> BITS * j % 8 & CODE;
      float w = s * (level(q, table) - z) + m;
      W[(size_t)input * n + i % n] = (T)(input_scale ? w / input_scale[input] : w);
    }
  }
}
