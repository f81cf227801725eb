// y = w x̂ + b,  x̂ = (x − μ) r,  r = 1/√(mean (x − μ)² + ε).        x (rows, n);  a warp to a row, blockDim.x / 32 rows to a block
//
//   dx = r (ĝ − mean ĝ − x̂ mean ĝx̂),  ĝ = w g          a warp to a row again
//   dw = Σ g x̂,  db = Σ g  over rows                    a thread to a column: partial sums here, their sum in bias.cu
//
// The first entry of a row is taken off its entries before their mean, and the mean is kept without it: a row of equal numbers gives
// x̂ = 0, whatever the rounding of a mean.
#include "rows.cuh"

extern "C" __global__ void layer_norm(const T* x, const T* w, const T* b, T* y, float* mean, float* r, int rows, int n, float eps) {
  int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= rows) return;                               // allowed: a whole warp returns, and no barrier follows
  const T* xs = x + (size_t)row * n;
  float first = (float)xs[0], sum = 0, squares = 0;
  for (int i = lane; i < n; i += 32) sum += (float)xs[i] - first;
  float mu = warp_sum(sum) / n;
  for (int i = lane; i < n; i += 32) { float c = (float)xs[i] - first - mu; squares += c * c; }
  float scale = rsqrtf(warp_sum(squares) / n + eps);
  for (int i = lane; i < n; i += 32) y[(size_t)row * n + i] = (T)(((float)xs[i] - first - mu) * scale * (float)w[i] + (float)b[i]);
  if (lane == 0) { mean[row] = mu; r[row] = scale; }
}

extern "C" __global__ void layer_norm_back(const T* x, const T* w, const T* g, const float* mean, const float* r, T* dx, int rows, int n) {
  int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= rows) return;
  const T *xs = x + (size_t)row * n, *gs = g + (size_t)row * n;
  float first = (float)xs[0], mu = mean[row], scale = r[row], shift = 0, along = 0;
  for (int i = lane; i < n; i += 32) {
    float gw = (float)gs[i] * (float)w[i];
    shift += gw;
    along += gw * ((float)xs[i] - first - mu) * scale;
  }
  shift = warp_sum(shift) / n;
  along = warp_sum(along) / n;
  for (int i = lane; i < n; i += 32) {
    float xhat = ((float)xs[i] - first - mu) * scale;
    dx[(size_t)row * n + i] = (T)(scale * ((float)gs[i] * (float)w[i] - shift - xhat * along));
  }
}

// Block (32, 8): thread (c, k) adds up rows k, k + 8, ... of its column within the block's stretch of `each` rows; then the eight meet in
// shared memory.  parts (2, gridDim.y, n): g x̂ first, g after it.  Nothing depends on the order in which blocks run, so sums are the
// same bits every time; atomicAdd would be shorter, and would not be.
extern "C" __global__ void layer_norm_back_weights(const T* x, const T* g, const float* mean, const float* r, float* parts, int rows, int n, int each) {
  __shared__ float dw[8][32], db[8][32];
  int c = threadIdx.x, k = threadIdx.y, column = blockIdx.x * 32 + c, last = min(rows, (int)(blockIdx.y + 1) * each);
  float sum_w = 0, sum_b = 0;
  if (column < n)
    for (int row = blockIdx.y * each + k; row < last; row += 8) {
      size_t i = (size_t)row * n + column;
      sum_w += (float)g[i] * ((float)x[i] - (float)x[(size_t)row * n] - mean[row]) * r[row];
      sum_b += (float)g[i];
    }
  dw[k][c] = sum_w;
  db[k][c] = sum_b;
  __syncthreads();
  if (k > 1 || column >= n) return;                      // two of the eight rows of threads stay: one for each sum
  float sum = 0;
  for (int j = 0; j < 8; j++) sum += k == 0 ? dw[j][c] : db[j][c];
  parts[((size_t)k * gridDim.y + blockIdx.y) * n + column] = sum;
}
