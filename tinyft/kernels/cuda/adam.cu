// AdamW on many tensors at once: their norm, how far to scale it, and the update.  Every number of w, g, m, v is read once, and w, m, v are written once.
//
//   n = √Σ g² / S;  scale = min(clip / (n + 1e-6), 1) / S;   nothing moves where n is not finite.   S: what the loss was multiplied with
//   g ← scale g;   m ← β₁ m + (1 − β₁) g;   v ← β₂ v + (1 − β₂) g²;   w ← shrink w − rate m / (root √v + ε)
//
// All is float32.  Values and moments lie in flat arrays, gradients where backward left them: a table says where, and goes with the launch, as
// a plain argument.  Tensors in 16 bits (T) are shown w rounded.  What changes from step to step, rate = η/(1 − β₁ᵗ), root = 1/√(1 − β₂ᵗ) and
// shrink = 1 − ηλ, comes by value or, for a step that is captured once and replayed with other numbers, from memory of the device.
#include "rows.cuh"
#define TENSORS 150                                      // to a launch, whose arguments have room for 4 kB

struct Table { float* g[TENSORS]; long long start[TENSORS]; long long size[TENSORS]; };
#define MINE(i, n) (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x)

__device__ float update(float* w, float d, float* m, float* v, long long i, float rate, float root, float shrink, float b1, float c1,
                        float b2, float c2, float eps) {
  float p = b1 * m[i] + c1 * d, q = b2 * v[i] + c2 * d * d;
  m[i] = p;
  v[i] = q;
  return w[i] = shrink * w[i] - rate * p / (root * sqrtf(q) + eps);
}

// blockIdx.y is the tensor.  parts (tensors, gridDim.x)
extern "C" __global__ void squares(const Table table, float* parts) {
  __shared__ float part[32];
  const float* g = table.g[blockIdx.y];
  float sum = 0;
  for MINE(i, table.size[blockIdx.y]) sum += g[i] * g[i];
  sum = block_sum(sum, part);
  if (threadIdx.x == 0) parts[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// One block.  inverse: 1 / S.  state: the norm, the scale.  A loss that is not finite makes the norm so
extern "C" __global__ void norm_and_scale(const float* parts, int n, float clip, float inverse, const float* loss, float* state) {
  __shared__ float part[32];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += parts[i];
  sum = block_sum(sum, part);
  if (threadIdx.x) return;
  float norm = sqrtf(sum) * inverse + (loss ? 0 * *loss : 0);
  state[0] = norm;
  state[1] = (clip > 0 ? fminf(clip / (norm + 1e-6f), 1) : 1) * inverse;
}

extern "C" __global__ void adam_tensors(const Table table, float* w, float* m, float* v, T* shown, const float* state, const float* rates,
                                        float rate, float root, float shrink, float b1, float c1, float b2, float c2, float eps) {
  float norm = state[0], scale = state[1];
  if (!(norm - norm == 0)) return;                       // infinite or no number
  if (rates) { rate = rates[0]; root = rates[1]; shrink = rates[2]; }
  float* g = table.g[blockIdx.y];
  long long start = table.start[blockIdx.y];
  for MINE(i, table.size[blockIdx.y]) {
    float d = scale * g[i];
    if (scale != 1) g[i] = d;
    float now = update(w, d, m, v, start + i, rate, root, shrink, b1, c1, b2, c2, eps);
    if (shown) shown[start + i] = (T)now;
  }
}

// One stretch alone.
extern "C" __global__ void adam(float* w, const float* g, float* m, float* v, float rate, float root, float shrink, float b1, float c1, float b2, float c2, float eps,
                                long long n) {
  for MINE(i, n) update(w, g[i], m, v, i, rate, root, shrink, b1, c1, b2, c2, eps);
}
