// y = x Φ(x).  A thread takes every (gridDim.x · blockDim.x)-th element, so that the threads of a warp read adjacent elements.
//
//   exact:  Φ(x) = erfc(−x/√2) / 2,                             Φ + x φ,  φ = e^(−x²/2) / √2π
//   tanh:   (1 + h)/2,  h = tanh(√(2/π) (x + 0.044715 x³)),     (1 + h)/2 + x (1 − h²)/2 √(2/π) (1 + 0.134145 x²)

#define EACH(i, n) (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x)

__device__ float cdf(float x) { return 0.5f * erfcf(-0.70710678f * x); }          // 1 + erf would lose the digits of small results
__device__ float h(float x) { return tanhf(0.79788456f * (x + 0.044715f * x * x * x)); }

extern "C" __global__ void gelu(const T* x, T* y, long long n) {
  for EACH(i, n) { float a = (float)x[i]; y[i] = (T)(a * cdf(a)); }
}

extern "C" __global__ void gelu_back(const T* x, const T* g, T* dx, long long n) {
  for EACH(i, n) { float a = (float)x[i]; dx[i] = (T)((float)g[i] * (cdf(a) + a * 0.39894228f * expf(-0.5f * a * a))); }
}

extern "C" __global__ void gelu_tanh(const T* x, T* y, long long n) {
  for EACH(i, n) { float a = (float)x[i]; y[i] = (T)(0.5f * a * (1 + h(a))); }
}

extern "C" __global__ void gelu_tanh_back(const T* x, const T* g, T* dx, long long n) {
  for EACH(i, n) {
    float a = (float)x[i], t = h(a);
    dx[i] = (T)((float)g[i] * 0.5f * (1 + t + a * (1 - t * t) * 0.79788456f * (1 + 0.134145f * a * a)));
  }
}
