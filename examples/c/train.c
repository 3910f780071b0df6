// Trains a small adapter, saves it, loads it again, and evaluates and generates with it: examples
// of two tasks in one batch, tokens as they come.
//
//   train MODEL_DIR OUTPUT_DIR
//
// Ids stand for text here; polytape's C library has no tokenizer.

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "polytape.h"

#define N_EXAMPLES 4
#define N_LABELS 11 // Of all examples.
#define N_STEPS 5

static void check(int32_t status, const char *what) {
    if (status == POLYTAPE_OK) return;
    fprintf(stderr, "%s: status %" PRId32 ": %s\n", what, status, polytape_last_error());
    exit(1);
}

static int on_token(void *user, size_t example, uint32_t token) {
    size_t *n_tokens = user;
    ++*n_tokens;
    printf("token %zu %" PRIu32 "\n", example, token);
    return 0; // Go on.
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL_DIR OUTPUT_DIR\n", argv[0]);
        return 2;
    }
    if (polytape_abi_version() != POLYTAPE_ABI_VERSION) {
        fprintf(stderr, "the library has another ABI than the header\n");
        return 1;
    }

    polytape_model *model = NULL;
    polytape_model_options options = {.size = sizeof options, .dtype = POLYTAPE_DTYPE_F32};
    check(polytape_model_open(argv[1], &options, &model), "open");
    polytape_model_info info = {.size = sizeof info};
    check(polytape_model_get_info(model, &info), "info");
    fprintf(stderr, "polytape %s: %zu ids, %zu linears, %s, %" PRIu32 " threads\n",
            polytape_version(), info.vocab_size, info.n_linears, info.isa, info.n_threads);

    static const uint32_t inputs[N_EXAMPLES][4] = {{5, 6, 7, 1}, {9, 4, 1}, {12, 13, 14, 1}, {8, 1}};
    static const uint32_t labels[N_EXAMPLES][3] = {{9, 8, 1}, {3, 1}, {6, 5, 1}, {10, 4, 1}};
    const polytape_example examples[N_EXAMPLES] = {
        {.input = inputs[0], .n_input = 4, .labels = labels[0], .n_labels = 3, .task = 0},
        {.input = inputs[1], .n_input = 3, .labels = labels[1], .n_labels = 2, .task = 1},
        {.input = inputs[2], .n_input = 4, .labels = labels[2], .n_labels = 3, .task = 1},
        {.input = inputs[3], .n_input = 2, .labels = labels[3], .n_labels = 3, .task = 0},
    };

    // A fresh adapter, and some steps.
    polytape_adapter_config config;
    check(polytape_adapter_config_init(&config, sizeof config), "config");
    config.n_tasks = 2;
    config.n_skills = 3;
    config.n_splits = 2;
    config.r = 4;
    polytape_adapter *fresh = NULL;
    check(polytape_adapter_new(model, &config, 42, &fresh), "new adapter");
    polytape_train_config train;
    check(polytape_train_config_init(&train, sizeof train), "train config");
    train.learning_rate = 1e-2;
    train.max_steps = N_STEPS;
    train.batch_size = 2; // Two micro-batches a step.
    polytape_trainer *trainer = NULL;
    check(polytape_trainer_new(fresh, &train, &trainer), "new trainer");
    for (int i = 0; i < N_STEPS; ++i) {
        polytape_step_report report = {.size = sizeof report};
        check(polytape_trainer_step(trainer, examples, N_EXAMPLES, &report), "step");
        printf("step %" PRIu64 " %.17g %.17g\n", report.step, report.loss, report.grad_norm);
    }
    polytape_adapter *trained = NULL;
    check(polytape_trainer_get_adapter(trainer, &trained), "trained adapter");
    check(polytape_adapter_save(trained, argv[2]), "save");
    polytape_trainer_free(trainer);
    polytape_adapter_free(trained);
    polytape_adapter_free(fresh);

    // What PEFT would load.
    polytape_adapter *adapter = NULL;
    check(polytape_adapter_open(model, argv[2], &adapter), "open adapter");
    polytape_engine *engine = NULL;
    check(polytape_engine_new(model, adapter, NULL, 0, N_EXAMPLES, &engine), "new engine");
    double nll[N_LABELS];
    check(polytape_engine_nll(engine, examples, N_EXAMPLES, nll, N_LABELS), "nll");
    for (int i = 0; i < N_LABELS; ++i) printf("nll %d %.17g\n", i, nll[i]);
    float *logits = malloc(N_LABELS * info.vocab_size * sizeof *logits);
    if (!logits) return 1;
    check(polytape_engine_logits(engine, examples, N_EXAMPLES, logits, N_LABELS * info.vocab_size),
          "logits");
    printf("logits %.9g %.9g\n", logits[0], logits[N_LABELS * info.vocab_size - 1]);
    free(logits);
    polytape_generate_options generate;
    check(polytape_generate_options_init(&generate, sizeof generate), "generate options");
    generate.max_new_tokens = 6;
    size_t n_tokens = 0;
    check(polytape_engine_generate(engine, examples, N_EXAMPLES, &generate, on_token, &n_tokens),
          "generate");
    printf("tokens %zu\n", n_tokens);
    polytape_engine_free(engine);

    // Routing by weights: the first skill alone, in both splits.
    polytape_adapter_info adapter_info = {.size = sizeof adapter_info};
    check(polytape_adapter_get_info(adapter, &adapter_info), "adapter info");
    size_t n_weights = adapter_info.n_splits * adapter_info.n_skills;
    float *weights = calloc(n_weights, sizeof *weights);
    if (!weights) return 1;
    for (size_t i = 0; i < n_weights; i += adapter_info.n_skills) weights[i] = 1.0f;
    check(polytape_engine_new_with_weights(model, adapter, weights, n_weights, 1, 2, &engine),
          "new engine with weights");
    free(weights);
    polytape_adapter_free(adapter); // The engine goes on.
    check(polytape_engine_nll(engine, examples, 1, nll, examples[0].n_labels), "nll");
    printf("one skill %.17g\n", nll[0]);
    polytape_engine_free(engine);
    check(polytape_model_verify(model), "verify");
    polytape_model_free(model);
    return 0;
}
