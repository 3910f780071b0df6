// The kernels alone: the routed LoRA of two tasks over one's own buffers, forward and backward, with
// and without the frozen weight. Prints every result, so that a test can compare them.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "polytape.h"

enum { N_TOKENS = 7, D_IN = 24, D_OUT = 20, RANK = 4, N_SPLITS = 2, N_SKILLS = 3, N_TASKS = 2 };
enum { WIDTH = N_SPLITS * N_SKILLS };
enum { A_LEN = N_SKILLS * D_IN * RANK, B_LEN = N_SKILLS * RANK * D_OUT };
enum { LOGITS = A_LEN + B_LEN, N_PARAMS = LOGITS + N_TASKS * WIDTH };

static void check(int32_t status, const char *what) {
    if (status == POLYTAPE_OK) return;
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, polytape_last_error());
    exit(1);
}

// Small numbers that every language makes alike: multiples of 1/64.
static void fill(float *values, size_t n, uint32_t seed) {
    for (size_t i = 0; i < n; ++i) {
        seed = seed * 1664525u + 1013904223u;
        values[i] = (float)((int)(seed >> 24) - 128) / 64.0f;
    }
}

static void print(const char *name, const float *values, size_t n) {
    printf("%s", name);
    for (size_t i = 0; i < n; ++i) printf(" %.9g", values[i]);
    printf("\n");
}

int main(void) {
    static float params[N_PARAMS], weight[D_OUT * D_IN], bias[D_OUT];
    static float x[N_TOKENS * D_IN], d_y[N_TOKENS * D_OUT];
    fill(params, N_PARAMS, 1);
    fill(weight, D_OUT * D_IN, 2);
    fill(bias, D_OUT, 3);
    fill(x, N_TOKENS * D_IN, 4);
    fill(d_y, N_TOKENS * D_OUT, 5);

    polytape_kernels *kernels = NULL;
    check(polytape_kernels_new(NULL, &kernels), "kernels");

    // The mixing weights of both tasks.
    static float mixing[N_TASKS * WIDTH], samples[N_TASKS * WIDTH];
    const size_t logits = LOGITS;
    const uint32_t tasks[N_TASKS] = {0, 1};
    polytape_router router = {
        .size = sizeof router, .params = params, .n_params = N_PARAMS, .logits = &logits,
        .n_linears = 1, .n_tasks = N_TASKS, .n_splits = N_SPLITS, .n_skills = N_SKILLS,
        .tasks = tasks, .n_rows = N_TASKS,
    };
    check(polytape_route(kernels, &router, mixing, samples), "route");
    print("mixing", mixing, N_TASKS * WIDTH);

    // Three sequences, the second of another task than its neighbours.
    const size_t lens[] = {3, 2, 2}, rows[] = {0, 1, 0};
    polytape_routed_linear linear = {
        .size = sizeof linear, .params = params, .n_params = N_PARAMS, .a_start = 0,
        .b_start = A_LEN, .d_in = D_IN, .d_out = D_OUT, .rank = RANK, .n_splits = N_SPLITS,
        .n_skills = N_SKILLS, .mixing_weights = mixing, .n_rows = N_TASKS, .lens = lens,
        .rows = rows, .n_sequences = 3, .x = x, .weight = weight, .bias = bias,
        .weight_dtype = POLYTAPE_DTYPE_F32,
    };
    static float y[N_TOKENS * D_OUT], z[N_TOKENS * RANK];
    check(polytape_routed_linear_forward(kernels, &linear, 0, y, z), "forward");
    print("y", y, N_TOKENS * D_OUT);
    print("z", z, N_TOKENS * RANK);

    static float grads[N_PARAMS], d_mixing[N_TASKS * WIDTH], d_x[N_TOKENS * D_IN];
    polytape_routed_gradients gradients = {
        .size = sizeof gradients, .params = grads, .mixing_weights = d_mixing, .x = d_x,
    };
    check(polytape_routed_linear_backward(kernels, &linear, z, d_y, &gradients), "backward");
    check(polytape_route_backward(kernels, &router, mixing, samples, d_mixing, grads),
          "route backward");
    print("grads", grads, N_PARAMS);
    print("d_x", d_x, N_TOKENS * D_IN);

    // The routed LoRA alone, onto what is in y and d_x.
    linear.weight = linear.bias = NULL;
    check(polytape_routed_linear_forward(kernels, &linear, 1, y, NULL), "forward");
    print("y", y, N_TOKENS * D_OUT);
    gradients.add_to_x = 1;
    check(polytape_routed_linear_backward(kernels, &linear, z, d_y, &gradients), "backward");
    print("d_x", d_x, N_TOKENS * D_IN);

    return polytape_kernels_free(kernels);
}
