// Rademacher probes by position, and what is read off their products: see probe_kernels.py.
// Nothing is included: NVRTC compiles it.
//
// The sign of entry j of the probe with a key is bit j % 32 of word j / 32 % 4 of Philox4x32-10 at
// the counter j / 128: see philox.py, whose words these are.

constexpr int THREADS = 256;
constexpr int LANES = 32;
constexpr int WARPS = THREADS / LANES;
constexpr int BITS = 128;                     // of one counter
constexpr int FILLED = THREADS * BITS;        // columns of a block that writes probes
constexpr int COLUMNS = 8;                    // of a thread that reads products
constexpr int TILE = THREADS * COLUMNS;       // of a block that reads products
constexpr int COUNTERS = TILE / BITS;         // of such a block, for each probe
constexpr int PROBES = THREADS / COUNTERS;    // whose bits are made at once, one counter a thread

__device__ inline uint4 philox(unsigned long long key, unsigned long long counter) {
  unsigned int k0 = (unsigned int)key, k1 = (unsigned int)(key >> 32);
  uint4 x = make_uint4((unsigned int)counter, (unsigned int)(counter >> 32), 0u, 0u);
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const unsigned int high0 = __umulhi(0xD2511F53u, x.x), low0 = 0xD2511F53u * x.x;
    const unsigned int high1 = __umulhi(0xCD9E8D57u, x.z), low1 = 0xCD9E8D57u * x.z;
    x = make_uint4(high1 ^ x.y ^ k0, low1, high0 ^ x.w ^ k1, low0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x;
}

__device__ inline void keep(unsigned int* words, uint4 x) {
  words[0] = x.x;
  words[1] = x.y;
  words[2] = x.z;
  words[3] = x.w;
}

__device__ inline bool negative(const unsigned int* words, int column) {
  return words[column / 32] >> (column % 32) & 1u;
}

// Writes probes to rows [K, columns]; blocks are (columns / FILLED, K).
template <typename T>
__device__ inline void fill(T* rows, long long stride, long long columns, const long long* keys) {
  __shared__ unsigned int words[FILLED / 32];
  const long long first = (long long)blockIdx.x * FILLED;
  const unsigned long long key = (unsigned long long)keys[blockIdx.y];
  keep(words + 4 * threadIdx.x, philox(key, first / BITS + threadIdx.x));
  __syncthreads();
  T* row = rows + blockIdx.y * stride + first;
  const int length = (int)min((long long)FILLED, columns - first);
  for (int j = threadIdx.x; j < length; j += THREADS) row[j] = negative(words, j) ? T(-1) : T(1);
}

__device__ inline double summed(double x) {
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
  return x;
}

// Reads products y [K, columns] once: sums of z y and y y of each tile, [tiles, K, 2]; and, where
// they are given, the running regression of y on z in each column (sampling.regress), of which
// `known` observations went before.
template <typename T>
__device__ inline void read(const T* products, long long stride, long long columns, int count,
                            const long long* keys, long long known, T* diagonal, T* residual,
                            double* sums) {
  __shared__ unsigned int words[PROBES][TILE / 32];
  __shared__ double warps[PROBES][WARPS][2];
  const long long first = (long long)blockIdx.x * TILE;
  const int length = (int)min((long long)TILE, columns - first);
  T slopes[COLUMNS] = {}, squares[COLUMNS] = {};
  if (diagonal != nullptr) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      const int j = i * THREADS + threadIdx.x;
      if (j < length) {
        slopes[i] = diagonal[first + j];
        squares[i] = residual[first + j];
      }
    }
  }
  for (int start = 0; start < count; start += PROBES) {
    const int own = threadIdx.x / COUNTERS, counter = threadIdx.x % COUNTERS;
    if (start + own < count) {
      const unsigned long long key = (unsigned long long)keys[start + own];
      keep(words[own] + 4 * counter, philox(key, first / BITS + counter));
    }
    __syncthreads();
    const int stop = min(count - start, PROBES);
#pragma unroll 1
    for (int k = 0; k < stop; ++k) {
      const T* y = products + (start + k) * stride + first;
      const double seen = (double)(known + start + k + 1);
      const T gain = T(1.0 / seen), rest = T(1.0 - 1.0 / seen);
      T values[COLUMNS];
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) {
        const int j = i * THREADS + threadIdx.x;
        values[i] = j < length ? y[j] : T(0);
      }
      double product = 0.0, square = 0.0;
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) {
        const int j = i * THREADS + threadIdx.x;
        const T value = negative(words[k], j) ? -values[i] : values[i];
        product += (double)value;
        square += (double)value * (double)value;
        const T innovation = value - slopes[i];  // times z, as is all of this: z z = 1
        slopes[i] += gain * innovation;
        squares[i] += rest * (innovation * innovation);
      }
      product = summed(product);
      square = summed(square);
      if (threadIdx.x % LANES == 0) {
        warps[k][threadIdx.x / LANES][0] = product;
        warps[k][threadIdx.x / LANES][1] = square;
      }
    }
    __syncthreads();
    if (threadIdx.x < 2 * stop) {
      const int k = threadIdx.x / 2, which = threadIdx.x % 2;
      double sum = 0.0;
      for (int w = 0; w < WARPS; ++w) sum += warps[k][w][which];
      sums[((long long)blockIdx.x * count + start + k) * 2 + which] = sum;
    }
    // words are read no more; sums of warps are, until the barrier of the next round
  }
  if (diagonal != nullptr) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      const int j = i * THREADS + threadIdx.x;
      if (j < length) {
        diagonal[first + j] = slopes[i];
        residual[first + j] = squares[i];
      }
    }
  }
}

// ------------------------------------------------------------------------- entry points
#define PROBE_PASSES(NAME, T)                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 3)                                         \
      fill_##NAME(T* rows, long long stride, long long columns, const long long* keys) {       \
    fill<T>(rows, stride, columns, keys);                                                      \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 3)                                         \
      read_##NAME(const T* products, long long stride, long long columns, long long count,     \
                  const long long* keys, long long known, T* diagonal, T* residual,            \
                  double* sums) {                                                              \
    read<T>(products, stride, columns, (int)count, keys, known, diagonal, residual, sums);     \
  }

PROBE_PASSES(float32, float)
PROBE_PASSES(float64, double)
