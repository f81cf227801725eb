// ℓ = Σ w_y (−ln p_y) / Σ w_y,  p = softmax z.        z (rows, n);  a block to a row: the vocabulary is long
//
// The maximum of a row is subtracted before exp.  It is stored apart from the logarithm of the sum: their sum would lose the
// digits that a small loss consists of.  With smoothing ε (then without weights) a row's target is (1 − ε) of its label and ε/n
// of every class.  A label outside the classes makes the loss NaN.  An ignored row counts nowhere, whatever its logits are.
#include "rows.cuh"

// stats (3, rows): the row's maximum, ln Σ e^(z − maximum), its weight.   losses (rows): weighted
extern "C" __global__ void cross_entropy(const T* z, const long long* labels, const float* weight, float* losses, float* stats, int n,
                                         long long ignored, float smoothing) {
  __shared__ float part[32];
  size_t row = blockIdx.x, rows = gridDim.x;
  const T* zs = z + row * n;
  float top = NEVER, sum = 0, all = 0;
  for (int j = threadIdx.x; j < n; j += blockDim.x) top = fmaxf(top, (float)zs[j]);
  top = block_max(top, part);
  for (int j = threadIdx.x; j < n; j += blockDim.x) { sum += expf((float)zs[j] - top); all += (float)zs[j] - top; }
  float log_sum = logf(block_sum(sum, part));
  if (smoothing) all = block_sum(all, part);             // the same for every thread of the block, as a barrier inside an `if` must be
  if (threadIdx.x) return;

  long long y = labels[row];
  float w = 0, loss = 0;
  if (y != ignored) {
    bool there = y >= 0 && y < n;
    w = there ? (weight ? weight[y] : 1) : __int_as_float(0x7fffffff);
    loss = there ? w * ((1 - smoothing) * (log_sum - ((float)zs[y] - top)) + smoothing * (log_sum - all / n)) : w;
  }
  losses[row] = loss;
  stats[row] = top;
  stats[rows + row] = log_sum;
  stats[2 * rows + row] = w;
}

// One block adds up the rows, always in the same order.  value: Σ losses / Σ weights;  total: Σ weights
extern "C" __global__ void cross_entropy_mean(const float* losses, const float* weights, float* value, float* total, int rows) {
  __shared__ float part[32];
  float loss = 0, w = 0;
  for (int i = threadIdx.x; i < rows; i += blockDim.x) { loss += losses[i]; w += weights[i]; }
  loss = block_sum(loss, part);
  w = block_sum(w, part);
  if (threadIdx.x == 0) { *value = loss / w; *total = w; }
}

// dz = w (p − target) g / Σ w;  0 where w = 0, also if the logits or Σ w make the rest NaN
extern "C" __global__ void cross_entropy_back(const T* z, const long long* labels, const float* stats, const float* total, const float* g, T* dz, int n,
                                              float smoothing) {
  size_t row = blockIdx.x, rows = gridDim.x;
  float top = stats[row], log_sum = stats[rows + row], w = stats[2 * rows + row], scale = w * *g / *total;
  long long y = labels[row];
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    float target = (j == y ? 1 - smoothing : 0) + smoothing / n;
    dz[row * n + j] = (T)(w == 0 ? 0.0f : scale * (expf((float)z[row * n + j] - top - log_sum) - target));
  }
}
