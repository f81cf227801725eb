// AdamW on many tensors at once: the norm of all gradients, the factor that scales them, and the update.
// Every element of w, g, m and v is read once; w, m and v are written once.
//
//   n = √Σ g² / S;   scale = min(clip / (n + 1e-6), 1) / S;   S: the scale of the loss.  No update if n is not finite.
//   g ← scale g;   m ← β₁ m + (1 − β₁) g;   v ← β₂ v + (1 − β₂) g²;   w ← shrink w − rate m / (root √v + ε)
//
// All arrays are float32.  Values and moments lie in flat arrays.  Gradients stay where backward left them: a table of
// their addresses is a kernel argument.  Tensors in 16 bits (T) get w rounded.  These numbers change from step to step:
// rate = η/(1 − β₁ᵗ), root = 1/√(1 − β₂ᵗ), shrink = 1 − ηλ.  They are passed by value; a captured step, which is
// replayed with other numbers, reads them from device memory.
#include "rows.cuh"
#define TENSORS 150                                      // per launch: kernel arguments have room for 4 kB

struct Table { float* g[TENSORS]; long long start[TENSORS]; long long size[TENSORS]; };
#define MINE(i, n) (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; \
                    i += gridDim.x * (long long)blockDim.x)

__device__ float update(float* w, float d, float* m, float* v, long long i, float rate, float root, float shrink,
                        float b1, float c1, float b2, float c2, float eps) {
  float p = b1 * m[i] + c1 * d, q = b2 * v[i] + c2 * d * d;
  m[i] = p;
  v[i] = q;
  return w[i] = shrink * w[i] - rate * p / (root * sqrtf(q) + eps);
}

// blockIdx.y is the tensor.  parts: sums of squares, (tensors, gridDim.x).
extern "C" __global__ void squares(const Table table, float* parts) {
  __shared__ float part[32];
  const float* g = table.g[blockIdx.y];
  float sum = 0;
  for MINE(i, table.size[blockIdx.y]) sum += g[i] * g[i];
  sum = block_sum(sum, part);
  if (threadIdx.x == 0) parts[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// One block.  inverse: 1 / S.  state: the norm, then scale.  If the loss is not finite, neither is the norm.
extern "C" __global__ void norm_and_scale(const float* parts, int n, float clip, float inverse, const float* loss,
                                          float* state) {
  __shared__ float part[32];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += parts[i];
  sum = block_sum(sum, part);
  if (threadIdx.x) return;
  float norm = sqrtf(sum) * inverse + (loss ? 0 * *loss : 0);
  state[0] = norm;
  state[1] = (clip > 0 ? fminf(clip / (norm + 1e-6f), 1) : 1) * inverse;
}

extern "C" __global__ void adam_tensors(const Table table, float* w, float* m, float* v, T* rounded, const float* state,
                                        const float* rates, float rate, float root, float shrink,
                                        float b1, float c1, float b2, float c2, float eps) {
  float norm = state[0], scale = state[1];
  if (!(norm - norm == 0)) return;                       // infinite or NaN
  if (rates) { rate = rates[0]; root = rates[1]; shrink = rates[2]; }
  float* g = table.g[blockIdx.y];
  long long start = table.start[blockIdx.y];
  for MINE(i, table.size[blockIdx.y]) {
    float d = scale * g[i];
    if (scale != 1) g[i] = d;
    float now = update(w, d, m, v, start + i, rate, root, shrink, b1, c1, b2, c2, eps);
    if (rounded) rounded[start + i] = (T)now;
  }
}

// One flat array alone: one Piece of optim/buffers.py.
extern "C" __global__ void adam(float* w, const float* g, float* m, float* v, float rate, float root, float shrink,
                                float b1, float c1, float b2, float c2, float eps, long long n) {
  for MINE(i, n) update(w, g[i], m, v, i, rate, root, shrink, b1, c1, b2, c2, eps);
}
