// CUDA C on the CPU: enough of the language that a kernel's own source compiles with g++ or clang++ and does what it would do on a GPU.
//
// Blocks run one after another.  The threads of a block are fibres: one runs until it meets a barrier or a warp intrinsic, then the
// next one does; when all who must meet there have come, all go on.  So a forgotten barrier, a race or a shuffle in a branch shows:
//   - shared memory is full of poison when a block starts, and is looked at again when it ends: nothing may be written past its end;
//   - a barrier that some threads never reach, or reach at different lines, is an error that names the lines;
//   - threads can be run in the reverse order: a result that changes with it was a race.
// Not here: tensor cores, asynchronous copies, cooperative groups, barriers across blocks, streams.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__linux__) && !defined(EMU_THREADS)
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#else
#include <condition_variable>
#include <mutex>
#include <thread>
#endif

// ── the language ─────────────────────────────────────────────────────────────────────────────────────────────────────
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#ifdef __APPLE__
#define __shared__ static __attribute__((section("__DATA,emu_shared")))
extern char shared_begin[] __asm("section$start$__DATA$emu_shared"), shared_end[] __asm("section$end$__DATA$emu_shared");
#else                                                   // one block at a time: its memory is a section of this library
#define __shared__ static __attribute__((section("emu_shared")))
extern "C" __attribute__((visibility("hidden"))) char __start_emu_shared[], __stop_emu_shared[];
#define shared_begin __start_emu_shared
#define shared_end __stop_emu_shared
#endif
__shared__ char emu_no_empty_section[16] __attribute__((used)) = {0};

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
#define EMU_VECTORS(T, name)                                                                                     \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                             \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };                                                       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(float, float)
EMU_VECTORS(int, int)
EMU_VECTORS(unsigned, uint)

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

namespace emu {
static char error[400];
static void fail(const char *format, ...) {
  if (*error) return;                                   // the first one counts
  va_list a; va_start(a, format); vsnprintf(error, sizeof error, format, a); va_end(a);
}

// ── fibres: enter(t) runs thread t until it leaves; leave() goes back to whoever entered ──────────────────────────────
enum State { READY, AT_BARRIER, AT_WARP, DONE };
struct Fibre {
  State state; int line; unsigned mask;                 // where it waits, and for which lanes
  bool gave; uint64_t slot;                             // what it hands to the other lanes of its warp
  int vote;
};
static Fibre fibre[1024];
static int me, threads;
static bool fibres;                                     // false: the kernel never waits, so its threads are plain calls
static void (*body)(void *); static void *argument;

inline void become(int t) {
  me = t;
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}
static int made;                                        // fibres that are there, waiting to run the body once more
#if defined(__linux__) && !defined(EMU_THREADS)
static const size_t STACK = 128 * 1024;
static ucontext_t start_context[1024]; static jmp_buf here[1024], home; static bool started[1024];
static char *stacks;
inline void leave() { if (!_setjmp(here[me])) _longjmp(home, 1); }
static void live() { for (;;) { body(argument); fibre[me].state = DONE; leave(); } }
inline void enter(int t) {
  become(t);
  if (_setjmp(home)) return;
  if (started[t]) _longjmp(here[t], 1);                 // much cheaper than swapcontext, which asks the system each time
  started[t] = true; setcontext(&start_context[t]);
}
inline void make_fibres() {
  if (!stacks) stacks = (char *)mmap(nullptr, STACK * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (; made < threads; made++) {
    ucontext_t &c = start_context[made];
    started[made] = false; getcontext(&c);
    c.uc_stack.ss_sp = stacks + made * STACK; c.uc_stack.ss_size = STACK; c.uc_link = nullptr;
    makecontext(&c, live, 0);
  }
}
inline void abandon_fibres() { made = 0; }              // after an error: they stand in the middle of the body
#else                                                   // elsewhere: real threads, of which one at a time may run
static std::mutex &lock = *new std::mutex; static std::condition_variable *called = new std::condition_variable[1025];
static const int SCHEDULER = 1024; static long whose, generation;
inline void give(long turn) { std::unique_lock<std::mutex> held(lock); whose = turn; called[turn % 2048].notify_all(); }
inline void await(long turn) { std::unique_lock<std::mutex> held(lock); called[turn % 2048].wait(held, [=] { return whose == turn; }); }
inline void leave() { long mine = generation * 2048 + me; give(SCHEDULER); await(mine); }
inline void enter(int t) { become(t); give(generation * 2048 + t); await(SCHEDULER); }
static void live(long mine) { await(mine); for (;;) { body(argument); fibre[me].state = DONE; leave(); } }
inline void make_fibres() { for (; made < threads; made++) std::thread(live, generation * 2048 + made).detach(); }
inline void abandon_fibres() { made = 0; generation++; }
#endif
inline void wait(State state, int line, unsigned mask = ~0u) {
  if (!fibres) { fail("line %d waits for other threads in a kernel that was started without them", line); return; }
  fibre[me].state = state; fibre[me].line = line; fibre[me].mask = mask;
  leave();
}

// ── who may go on ────────────────────────────────────────────────────────────────────────────────────────────────────
static int votes;
inline bool release_barrier() {                         // every thread of the block is there, at one line: none may have returned before
  votes = 0;
  for (int t = 0; t < threads; t++) {
    if (fibre[t].state != AT_BARRIER || fibre[t].line != fibre[0].line) return false;
    votes += fibre[t].vote != 0;
  }
  for (int t = 0; t < threads; t++) fibre[t].state = READY;
  return true;
}
inline bool release_lanes(int leader) {                 // every lane its mask names is there, at one line, naming the same lanes
  int warp = leader & ~31; unsigned mask = fibre[leader].mask;
  for (int pass = 0; pass < 2; pass++)
    for (int t = warp; t < warp + 32 && t < threads; t++) {
      Fibre &f = fibre[t];
      if (!(mask >> (t & 31) & 1) || f.state == DONE) continue;
      if (pass) f.state = READY;
      else if (f.state != AT_WARP || f.line != fibre[leader].line || f.mask != mask) return false;
    }
  return true;
}
inline void explain() {
  int a = -1, b = -1, returned = -1;
  for (int t = 0; t < threads; t++) {
    if (fibre[t].state == DONE) returned = t;
    else if (a < 0) a = t;
    else if (b < 0 && (fibre[t].line != fibre[a].line || fibre[t].state != fibre[a].state || fibre[t].mask != fibre[a].mask)) b = t;
  }
  const char *what[] = {"", "the barrier", "the warp intrinsic", ""};
  if (b >= 0) fail("deadlock in block (%u, %u, %u): thread %d waits at %s in line %d, thread %d at %s in line %d", blockIdx.x, blockIdx.y, blockIdx.z,
                   a, what[fibre[a].state], fibre[a].line, b, what[fibre[b].state], fibre[b].line);
  else fail("deadlock in block (%u, %u, %u): thread %d waits at %s in line %d for threads that never come (thread %d returned)",
            blockIdx.x, blockIdx.y, blockIdx.z, a, what[fibre[a].state], fibre[a].line, returned);
}
inline int run_warp(int warp, bool reverse) {            // as far as it gets: warps know nothing of each other but at barriers
  int lanes = std::min(32, threads - warp);
  for (;;) {
    int waiting = 0; bool released = false;
    for (int i = 0; i < lanes; i++) {
      int t = warp + (reverse ? lanes - 1 - i : i);
      if (fibre[t].state == READY) enter(t);
      waiting += fibre[t].state != DONE;
    }
    for (int t = warp; t < warp + lanes; t++) if (fibre[t].state == AT_WARP) released |= release_lanes(t);
    if (!released || *error) return waiting;
  }
}
inline void run_block(bool reverse) {
  for (int t = 0; t < threads; t++) fibre[t] = Fibre();
  make_fibres();
  for (;;) {
    int waiting = 0, warps = (threads + 31) / 32;
    for (int i = 0; i < warps; i++) waiting += run_warp(32 * (reverse ? warps - 1 - i : i), reverse);
    if (!waiting || *error) return;
    if (!release_barrier()) return explain();
  }
}

// ── one launch ───────────────────────────────────────────────────────────────────────────────────────────────────────
static char *dynamic;
inline void *dynamic_shared() { return dynamic; }
inline const char *launch(const unsigned *size, size_t shared, bool reverse, int poison) {
  static const size_t GUARD = 4096;
  gridDim = dim3(size[0], size[1], size[2]); blockDim = dim3(size[3], size[4], size[5]);
  threads = blockDim.x * blockDim.y * blockDim.z; *error = 0;
  dynamic = (char *)aligned_alloc(256, (shared + GUARD + 255) / 256 * 256);
  for (unsigned z = 0; z < gridDim.z && !*error; z++) for (unsigned y = 0; y < gridDim.y && !*error; y++) for (unsigned x = 0; x < gridDim.x && !*error; x++) {
    blockIdx = {x, y, z};
    memset(shared_begin, poison, shared_end - shared_begin); memset(dynamic, poison, shared + GUARD);
    if (fibres) run_block(reverse);
    else for (int i = 0; i < threads; i++) { become(reverse ? threads - 1 - i : i); body(argument); }
    for (size_t i = 0; i < GUARD; i++) if ((unsigned char)dynamic[shared + i] != poison) {
      fail("block (%u, %u, %u) wrote past the end of its %zu bytes of dynamic shared memory", x, y, z, shared); break; }
  }
  free(dynamic);
  if (*error) abandon_fibres();
  return *error ? error : nullptr;
}
template <class... A> struct Call {
  void (*kernel)(A...); void **values;
  template <size_t... I> void call(std::index_sequence<I...>) { kernel(*(std::remove_cv_t<A> *)values[I]...); }
  static void go(void *self) { ((Call *)self)->call(std::index_sequence_for<A...>{}); }
};
template <class... A> const char *run(void (*kernel)(A...), bool waits, const unsigned *size, size_t shared, bool reverse, int poison, void **values) {
  Call<A...> c{kernel, values};
  body = &Call<A...>::go; argument = &c; fibres = waits;
  return launch(size, shared, reverse, poison);
}

// ── half precision: numbers of sixteen bits, computed with as float and rounded to even ──────────────────────────────
template <class To, class From> To bits(From f) { To t; static_assert(sizeof t == sizeof f, ""); memcpy(&t, &f, sizeof t); return t; }
inline float from_half(uint16_t h) {
  uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  float f = rest >= 0x7c00 ? bits<float>(rest << 13 | 0x7f800000u) : bits<float>(rest << 13) * 0x1p112f;       // the exponents' biases: 127 and 15
  return bits<float>(bits<uint32_t>(f) | sign);
}
inline uint16_t to_half(float f) {
  uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000u; u &= 0x7fffffffu; f = fabsf(f);
  if (u > 0x7f800000u) return sign | 0x7e00;
  if (f >= 65520.0f) return sign | 0x7c00;
  if (f < 0x1p-14f) return sign | (uint16_t)nearbyintf(f * 0x1p24f);
  return sign | (u - (112u << 23) + 0xfffu + (u >> 13 & 1)) >> 13;
}
inline float from_bfloat16(uint16_t h) { return bits<float>((uint32_t)h << 16); }
inline uint16_t to_bfloat16(float f) {
  uint32_t u = bits<uint32_t>(f);
  return (u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 0x40 : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
template <uint16_t (*narrow)(float), float (*widen)(uint16_t)> struct Small {
  uint16_t stored;
  Small() = default;
  Small(float f) : stored(narrow(f)) {}
  operator float() const { return widen(stored); }
  friend Small operator+(Small a, Small b) { return (float)a + (float)b; }
  friend Small operator-(Small a, Small b) { return (float)a - (float)b; }
  friend Small operator*(Small a, Small b) { return (float)a * (float)b; }
  friend Small operator/(Small a, Small b) { return (float)a / (float)b; }
  Small &operator+=(Small b) { return *this = *this + b; }
};

// ── the signature, for whoever calls: per parameter p (pointer) or v (value), then f, i or ?, then the size ──────────
template <class T> struct Kind { static const char value = std::is_floating_point<T>::value ? 'f' : std::is_integral<T>::value ? 'i' : '?'; };
template <uint16_t (*n)(float), float (*w)(uint16_t)> struct Kind<Small<n, w>> { static const char value = 'f'; };
template <class A> int describe(char *to) {
  using T = std::remove_cv_t<std::remove_pointer_t<std::remove_cv_t<A>>>;
  return sprintf(to, "%c%c%d ", std::is_pointer<A>::value ? 'p' : 'v', Kind<T>::value, (int)sizeof(std::conditional_t<std::is_void<T>::value, char, T>));
}
template <class... A> const char *signature(void (*)(A...)) {
  static char text[16 * sizeof...(A) + 1]; char *to = text;
  int unused[] = {0, (to += describe<A>(to), 0)...}; (void)unused;
  return text;
}

// ── barriers and warp intrinsics ─────────────────────────────────────────────────────────────────────────────────────
inline int barrier(int line, int vote = 0) { fibre[me].vote = vote; wait(AT_BARRIER, line); return votes; }
inline void sync_lanes(int line, unsigned mask = ~0u) {
  if (!(mask >> (me & 31) & 1)) fail("line %d: lane %d calls with a mask that leaves it out", line, me & 31);
  wait(AT_WARP, line, mask);
}
template <class T> T shuffle(int line, unsigned mask, T v, int lane, bool inside = true) {      // what `lane` gave, or its own if that lies outside
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  int from = inside ? (me & ~31) + lane : me; T r;
  fibre[me].gave = true; memcpy(&fibre[me].slot, &v, sizeof v);
  sync_lanes(line, mask);
  if (from < threads && fibre[from].gave) memcpy(&r, &fibre[from].slot, sizeof r);
  else memset(&r, 0x7f, sizeof r);                      // a lane that does not take part: anything may come
  sync_lanes(line, mask);                               // all have read; now the slots may be written again
  fibre[me].gave = false;
  return r;
}
template <class T> T shfl(int line, unsigned m, T v, int from, int w = 32) { int l = me & 31; return shuffle(line, m, v, (l & ~(w - 1)) + (from & (w - 1))); }
template <class T> T shfl_xor(int line, unsigned m, T v, int x, int w = 32) { int l = me & 31; return shuffle(line, m, v, l ^ x, ((l ^ x) & ~(w - 1)) <= (l & ~(w - 1))); }
template <class T> T shfl_down(int line, unsigned m, T v, int d, int w = 32) { int l = me & 31; return shuffle(line, m, v, l + d, (l & (w - 1)) + d < w); }
template <class T> T shfl_up(int line, unsigned m, T v, int d, int w = 32) { int l = me & 31; return shuffle(line, m, v, l - d, (l & (w - 1)) >= d); }
inline unsigned ballot(int line, unsigned mask, int p) {
  fibre[me].gave = true; fibre[me].slot = p != 0;
  sync_lanes(line, mask);
  unsigned r = 0;
  for (int l = 0; l < 32 && (me & ~31) + l < threads; l++) r |= unsigned(fibre[(me & ~31) + l].gave && fibre[(me & ~31) + l].slot & 1) << l & mask;
  sync_lanes(line, mask);
  fibre[me].gave = false;
  return r;
}
inline unsigned alive(unsigned mask) { unsigned r = 0; for (int l = 0; l < 32 && (me & ~31) + l < threads; l++) r |= unsigned(fibre[(me & ~31) + l].state != DONE) << l; return r & mask; }
}  // namespace emu

#define __syncthreads() ((void)emu::barrier(__LINE__))
#define __syncthreads_or(p) (emu::barrier(__LINE__, p) != 0)
#define __syncthreads_count(p) emu::barrier(__LINE__, p)
#define __syncthreads_and(p) (emu::barrier(__LINE__, !(p)) == 0)
#define __syncwarp(...) emu::sync_lanes(__LINE__, ##__VA_ARGS__)
#define __shfl_sync(...) emu::shfl(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emu::shfl_xor(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emu::shfl_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emu::shfl_up(__LINE__, __VA_ARGS__)
#define __ballot_sync(...) emu::ballot(__LINE__, __VA_ARGS__)
#define __any_sync(mask, p) (emu::ballot(__LINE__, mask, p) != 0)
#define __all_sync(mask, p) (emu::ballot(__LINE__, mask, !(p)) == 0)
#define __activemask() emu::alive(~0u)
inline void __threadfence() {}
inline void __threadfence_block() {}

// ── atomics: only one thread runs at a time ──────────────────────────────────────────────────────────────────────────
#define EMU_ATOMIC(name, expression) template <class T, class U> inline T name(T *p, U u) { T old = *p, v = (T)u; (void)v; *p = (expression); return old; }
EMU_ATOMIC(atomicAdd, old + v) EMU_ATOMIC(atomicSub, old - v) EMU_ATOMIC(atomicExch, v) EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicOr, old | v) EMU_ATOMIC(atomicXor, old ^ v) EMU_ATOMIC(atomicMax, old > v ? old : v) EMU_ATOMIC(atomicMin, old < v ? old : v)
template <class T, class U, class V> inline T atomicCAS(T *p, U compare, V v) { T old = *p; if (old == (T)compare) *p = (T)v; return old; }

// ── functions of the device ──────────────────────────────────────────────────────────────────────────────────────────
typedef emu::Small<emu::to_half, emu::from_half> __half, half;
typedef emu::Small<emu::to_bfloat16, emu::from_bfloat16> __nv_bfloat16, nv_bfloat16;
inline float __half2float(__half h) { return h; }
inline __half __float2half(float f) { return f; }
inline float __bfloat162float(__nv_bfloat16 h) { return h; }
inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline int __float_as_int(float f) { return emu::bits<int>(f); }
inline float __int_as_float(int i) { return emu::bits<float>(i); }
inline unsigned __float_as_uint(float f) { return emu::bits<unsigned>(f); }
inline float __uint_as_float(unsigned i) { return emu::bits<float>(i); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {               // byte i of the result: number (s >> 4 i) & 7 of the eight
  unsigned y = 0;
  for (int i = 0; i < 4; i++) y |= ((s >> 4 * i & 4 ? b : a) >> 8 * (s >> 4 * i & 3) & 255) << 8 * i;
  return y;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
#define __expf expf
#define __logf logf
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __fdividef(a, b) ((a) / (b))
#define rsqrtf(x) (1.0f / sqrtf(x))                     // macros: some C libraries have functions of these names
#define rsqrt(x) (1.0 / sqrt(x))
template <class T> inline T __ldg(const T *p) { return *p; }
template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) { return a > b ? a : b; }
