// The router: mixing weights of every routing row in every adapted linear, in one launch.
//   p = clamp(sigmoid(z), e, 1 - e)   u' = clamp(u, e, 1 - e)   l = ln u' - ln(1 - u') + ln p - ln(1 - p)
//   sample = clamp(sigmoid(l), tiny, 1 - e)   (without noise sigmoid(z))
//   w = v / n, n = sum_s v + 1e-12, v = sample
//   d_sample = (d_w - sum_s w d_w) / n, d_z = d_sample * sample * (1 - sample), 0 where a clamp cut
// With `rounds` v = 1 where sample > 1/2, else 0, and n is at least 1; with `factor` w = v * factor.
//   params, grads: flat   logits [linears]: where each router starts   tasks, examples [rows]
//   samples, weights, d_weights [linears * rows, splits * skills]   noise: 0 off, 1 Philox, 2 given
//   d_logits [linears * rows, splits * skills]: what each linear's row asks of the logits that it read
// Grid of `route` and `route_backward`: x = linears * rows * splits / 128, a thread a split. Linears may share
// a router, and rows a task: grid of `route_sum`: x = routers * rows * splits * skills / 128, a thread a
// logit, by the first of its task's rows; it adds linears and rows in order, so that nothing needs atomics, in f64.
// routers: where each router's linears start in the list that follows [routers + 1], and the list [linears].
#include "philox.cuh"

struct Route {
    const float* params;
    const u64* logits;
    const u32* tasks;
    const u32* examples;
    const float* draws;
    Key key;
    u32 noise, n_linears, n_rows, n_splits, n_skills, rounds;
    float factor;  // 0: weights are normalised.
};

__device__ inline float router_sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return x < 0.0f ? e / (1.0f + e) : 1.0f / (1.0f + e);
}

__device__ inline float clamp(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;  // A NaN stays one.
}

struct Sample {
    float value;
    bool passes;  // Whether the gradient does: nothing was clamped.
};

__device__ inline Sample sample(const Route& route, u32 linear, u32 row, u32 col) {
    const u32 width = route.n_splits * route.n_skills;
    const float z = route.params[route.logits[linear] + u64(route.tasks[row]) * width + col];
    if (route.noise == 0) return Sample{router_sigmoid(z), true};
    float u;
    if (route.noise == 1) {
        const Block block = philox(route.key, col / 4, 0, route.examples[row], linear);
        const u32 i = col % 4;
        u = unit(i == 0 ? block.words[0] : i == 1 ? block.words[1]
               : i == 2 ? block.words[2] : block.words[3]);
    } else {
        u = route.draws[(size_t(linear) * route.n_rows + row) * width + col];
    }
    const float low = 1.1920929e-7f, high = 1.0f - 1.1920929e-7f, tiny = 1.1754944e-38f;
    const float raw_p = router_sigmoid(z);
    const float p = clamp(raw_p, low, high);
    u = clamp(u, low, high);
    const float raw = router_sigmoid(logf(u) - log1pf(-u) + logf(p) - log1pf(-p));
    const bool passes = raw_p >= low && raw_p <= high && raw >= tiny && raw <= high;
    return Sample{clamp(raw, tiny, high), passes};
}

__device__ inline float weighed(const Route& route, float sample) {
    if (!route.rounds) return sample;
    return sample > 0.5f ? 1.0f : sample <= 0.5f ? 0.0f : sample;  // A NaN stays one.
}

__device__ inline float normalizer(const Route& route, float sum) {
    if (!route.rounds) return sum + 1e-12f;
    return sum < 1.0f ? 1.0f : sum;
}

extern "C" __global__ void __launch_bounds__(128)
route(float* weights, float* samples, Route route) {
    after_previous();
    const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 split = index % route.n_splits, at = index / route.n_splits;
    if (at >= route.n_linears * route.n_rows) return;
    const size_t first = size_t(at) * route.n_splits * route.n_skills + split * route.n_skills;
    float sum = 0.0f;
    for (u32 s = 0; s < route.n_skills; ++s) {
        const u32 col = split * route.n_skills + s;
        const float value = sample(route, at / route.n_rows, at % route.n_rows, col).value;
        samples[first + s] = value;
        sum += weighed(route, value);
    }
    const float n = normalizer(route, sum);
    for (u32 s = 0; s < route.n_skills; ++s) {
        const float value = weighed(route, samples[first + s]);
        weights[first + s] = route.factor != 0.0f ? value * route.factor : value / n;
    }
}

extern "C" __global__ void __launch_bounds__(128)
route_backward(float* d_logits, const float* d_weights, const float* weights, const float* samples,
               Route route) {
    after_previous();
    const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 split = index % route.n_splits, at = index / route.n_splits;
    if (at >= route.n_linears * route.n_rows) return;
    const size_t first = size_t(at) * route.n_splits * route.n_skills + split * route.n_skills;
    float sum = 0.0f, mean = 0.0f;
    for (u32 s = 0; s < route.n_skills; ++s) {
        sum += weighed(route, samples[first + s]);
        mean = fmaf(weights[first + s], d_weights[first + s], mean);
    }
    for (u32 s = 0; s < route.n_skills; ++s) {
        const u32 col = split * route.n_skills + s;
        const float d_sample = route.factor != 0.0f ? d_weights[first + s] * route.factor
                                                    : (d_weights[first + s] - mean) / normalizer(route, sum);
        const float value = samples[first + s];
        const bool passes = sample(route, at / route.n_rows, at % route.n_rows, col).passes;
        d_logits[first + s] = passes ? d_sample * value * (1.0f - value) : 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(128)
route_sum(float* grads, const float* d_logits, const u64* routers, u32 n_routers, Route route) {
    after_previous();
    const u32 index = blockIdx.x * blockDim.x + threadIdx.x, width = route.n_splits * route.n_skills;
    const u32 col = index % width, row = index / width % route.n_rows, router = index / width / route.n_rows;
    if (router >= n_routers) return;
    const u32 task = route.tasks[row];
    for (u32 other = 0; other < row; ++other)
        if (route.tasks[other] == task) return;
    const u64* linears = routers + n_routers + 1;
    float* to = grads + route.logits[linears[routers[router]]] + u64(task) * width + col;
    double sum = *to;  // How many add up here is not bounded.
    for (u64 i = routers[router]; i < routers[router + 1]; ++i)
        for (u32 other = row; other < route.n_rows; ++other)
            if (route.tasks[other] == task) sum += d_logits[(linears[i] * route.n_rows + other) * width + col];
    *to = float(sum);
}
