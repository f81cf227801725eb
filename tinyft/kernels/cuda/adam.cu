// AdamW on flat arrays, all in one pass: every number of w, g, m, v is read once, and w, m, v are written once.
//
//   m ← β₁ m + (1 − β₁) g;   v ← β₂ v + (1 − β₂) g²;   w ← shrink w − rate m / (root √v + ε)
//
// What changes from step to step, rate = η/(1 − β₁ᵗ), root = 1/√(1 − β₂ᵗ) and shrink = 1 − ηλ, comes by value or, for a step that is
// captured once and replayed with other numbers, from memory of the device.

__device__ void update(T* w, const T* g, T* m, T* v, float rate, float root, float shrink, float b1, float c1, float b2, float c2, float eps, long long n) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x) {
    float d = (float)g[i], p = b1 * (float)m[i] + c1 * d, q = b2 * (float)v[i] + c2 * d * d;
    m[i] = (T)p;
    v[i] = (T)q;
    w[i] = (T)(shrink * (float)w[i] - rate * p / (root * sqrtf(q) + eps));
  }
}

extern "C" __global__ void adam(T* w, const T* g, T* m, T* v, float rate, float root, float shrink, float b1, float c1, float b2, float c2, float eps,
                                long long n) {
  update(w, g, m, v, rate, root, shrink, b1, c1, b2, c2, eps, n);
}

extern "C" __global__ void adam_replayed(T* w, const T* g, T* m, T* v, const float* rates, float b1, float c1, float b2, float c2, float eps, long long n) {
  update(w, g, m, v, rates[0], rates[1], rates[2], b1, c1, b2, c2, eps, n);
}
