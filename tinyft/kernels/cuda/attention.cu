// The middle of attention, between its two products: scores in, probabilities out.        scores (lead, heads, t, n);  a warp to a row
//
//   P = softmax(α S + B) over the keys that a query may look at;   dB = P (dP − Σ dP P),  dS = α dB,  dP = (G Vᵀ) ⊙ M
//
// Which keys those are is computed here from two numbers, without a mask in memory: query i looks at key j ≤ i + n − t (causal), and only
// where key_mask is true.  The bias B and key_mask are read with strides of their own, zero along axes of length one.  A query that may
// look at no key gives zeros.  Scores and dP are float, as their products sum them; P and dS are T.  Where T is float, P may be written
// over the scores and dS over dP.
#include "rows.cuh"

struct Strides { long long lead, head, query, key; };

__device__ long long offset(const Strides& by, long long row, int t, int heads) {          // of the first key of a row
  return row / t / heads * by.lead + row / t % heads * by.head + row % t * by.query;
}

extern "C" __global__ void masked_softmax(const float* scores, const T* bias, const bool* key_mask, const T* dropout_mask, T* p, T* dropped,
                                          long long rows, int n, int t, int heads, int causal, float alpha,
                                          long long bias_lead, long long bias_head, long long bias_query, long long bias_key,
                                          long long mask_lead, long long mask_head, long long mask_query, long long mask_key) {
  long long row = blockIdx.x * (long long)(blockDim.x >> 5) + (threadIdx.x >> 5);
  int lane = threadIdx.x & 31;
  if (row >= rows) return;
  int i = row % t, ends = causal ? i + n - t + 1 : n;    // the first `ends` keys
  const float* s = scores + row * n;
  const T* add = bias ? bias + offset({bias_lead, bias_head, bias_query, bias_key}, row, t, heads) : 0;
  const bool* may = key_mask ? key_mask + offset({mask_lead, mask_head, mask_query, mask_key}, row, t, heads) : 0;
  auto looks = [&](int j) { return j < ends && (!may || may[j * mask_key]); };
  auto score = [&](int j) { return alpha * s[j] + (add ? (float)add[j * bias_key] : 0.0f); };

  float top = NEVER, sum = 0;
  for (int j = lane; j < ends; j += 32) if (looks(j)) top = fmaxf(top, score(j));
  top = warp_max(top);
  if (top == NEVER) top = 0;                             // no key: minus infinity less itself is no number
  for (int j = lane; j < ends; j += 32) if (looks(j)) sum += expf(score(j) - top);
  sum = warp_sum(sum);
  float share = sum == 0 ? 0 : 1 / sum;
  for (int j = lane; j < n; j += 32) {
    float value = looks(j) ? expf(score(j) - top) * share : 0;
    if (dropout_mask) dropped[row * n + j] = (T)(value * (float)dropout_mask[row * n + j]);
    p[row * n + j] = (T)value;                           // p may be where scores were: this lane has read what it now writes over
  }
}

extern "C" __global__ void masked_softmax_back(const T* p, const T* dropout_mask, const float* dp, T* ds, float* db, long long rows, int n,
                                               float alpha) {
  long long row = blockIdx.x * (long long)(blockDim.x >> 5) + (threadIdx.x >> 5);
  int lane = threadIdx.x & 31;
  if (row >= rows) return;
  float along = 0;
  for (long long j = row * n + lane; j < (row + 1) * n; j += 32) along += (float)p[j] * dp[j] * (dropout_mask ? (float)dropout_mask[j] : 1);
  along = warp_sum(along);
  for (long long j = row * n + lane; j < (row + 1) * n; j += 32) {
    float d = (float)p[j] * (dp[j] * (dropout_mask ? (float)dropout_mask[j] : 1) - along);
    if (db) db[j] = d;
    ds[j] = (T)(alpha * d);
  }
}
