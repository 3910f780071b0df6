// polytape: trains and runs Poly / MHR adapters over a frozen, memory-mapped transformer.
//
// Every function but polytape_abi_version, polytape_version and polytape_last_error returns a status;
// after one that is not POLYTAPE_OK, polytape_last_error says what was wrong. Objects are handles: what
// was freed or is of another kind is noticed, not followed. Structures begin with their size. Memory is
// the caller's, and nothing keeps a pointer after its function returned. Objects may be shared by
// threads, as each says.
//
// Made from src/capi by cbindgen; a test compares them.

#ifndef POLYTAPE_H
#define POLYTAPE_H

#include <stddef.h>
#include <stdint.h>

// The version of this header's functions and structures. A library with another one is another
// library; within one version structures only grow at their end, and functions are only added.
#define POLYTAPE_ABI_VERSION 1

// A beam search ends when no beam looks better than the worst finished one at its present length.
#define POLYTAPE_EARLY_STOPPING_FALSE 0

// A beam search ends as soon as there are `num_beams` finished sequences.
#define POLYTAPE_EARLY_STOPPING_TRUE 1

// A beam search ends when no beam can become better at any length.
#define POLYTAPE_EARLY_STOPPING_NEVER 2

// Computes in bf16 where the base is 16-bit, else in f32.
#define POLYTAPE_DTYPE_AUTO 0

// 32-bit IEEE.
#define POLYTAPE_DTYPE_F32 1

// The upper half of f32. Sums and parameters are f32 all the same.
#define POLYTAPE_DTYPE_BF16 2

// 16-bit IEEE: of frozen weights only.
#define POLYTAPE_DTYPE_F16 3

// Done.
#define POLYTAPE_OK 0

// It failed: a file that cannot be written, a loss that is not finite.
#define POLYTAPE_FAILED 1

// An argument that cannot mean anything.
#define POLYTAPE_USAGE 2

// A file or its content is wrong; the message names file, tensor or field.
#define POLYTAPE_BAD_INPUT 3

// There is no such device or instruction set.
#define POLYTAPE_NO_DEVICE 4

// A pointer is null that must not be.
#define POLYTAPE_NULL 5

// A handle is of an object that was freed, of another kind, or of none.
#define POLYTAPE_BAD_HANDLE 6

// A structure's `size` is of no version of it, or memory is too small, misaligned or overlaps.
#define POLYTAPE_BAD_SIZE 7

// Another call, in another thread or around this one, is using an object that one may use at a time.
#define POLYTAPE_BUSY 8

// A callback said to stop.
#define POLYTAPE_STOPPED 9

// A bug in polytape: the call was abandoned, the object it was about can only be freed.
#define POLYTAPE_PANIC 10

// The process was forked after it had used polytape: its threads stayed in the parent.
#define POLYTAPE_FORKED 11

// The learning rates fall linearly to 0 at `max_steps`.
#define POLYTAPE_SCHEDULE_LINEAR 0

// They fall along half a cosine.
#define POLYTAPE_SCHEDULE_COSINE 1

// They stay, without warm-up.
#define POLYTAPE_SCHEDULE_CONSTANT 2

// They stay after warm-up.
#define POLYTAPE_SCHEDULE_CONSTANT_WITH_WARMUP 3

// A Poly / MHR adapter of a base; it does not change. Any thread may use it, several at a time.
typedef struct polytape_adapter polytape_adapter;

// A base, maybe with an adapter, ready to compute. Any thread may use it, several at a time.
typedef struct polytape_engine polytape_engine;

// A CPU: an instruction set, threads and a compute type. Any thread may use it, several at a time.
typedef struct polytape_kernels polytape_kernels;

// A frozen base, mapped from its folder. Any thread may use it, several at a time.
typedef struct polytape_model polytape_model;

// An adapter in training. Any thread may use it, one at a time: others get POLYTAPE_BUSY.
typedef struct polytape_trainer polytape_trainer;

// PEFT's PolyConfig.
typedef struct polytape_adapter_config {
    // sizeof(polytape_adapter_config).
    size_t size;
    // The rank of a skill.
    size_t r;
    // Rows of the router.
    size_t n_tasks;
    // LoRA pairs in the shared bank.
    size_t n_skills;
    // Slices of the feature axis with their own mixture: 1 is Poly, more is MHR.
    size_t n_splits;
    // What is adapted: names with commas between, a pattern for whole paths, "all-linear"; null: the
    // default of the architecture.
    const char *target_modules;
    // Not 0: B begins as zeros, so that a fresh adapter changes nothing.
    uint32_t init_weights;
    // 0.
    uint32_t reserved;
} polytape_adapter_config;

// What an adapter is.
typedef struct polytape_adapter_info {
    // sizeof(polytape_adapter_info).
    size_t size;
    // The rank of a skill.
    size_t r;
    // Rows of the router.
    size_t n_tasks;
    // LoRA pairs in the shared bank.
    size_t n_skills;
    // Slices of the feature axis with their own mixture.
    size_t n_splits;
    // The linears that it adapts.
    size_t n_linears;
    // Parameters in all.
    size_t n_params;
} polytape_adapter_info;

// One example as ids.
typedef struct polytape_example {
    // What the encoder sees; for a causal model the prompt. At least one id.
    const uint32_t *input;
    // Its ids.
    size_t n_input;
    // What should be said, with the end id; may be null where `n_labels` is 0.
    const uint32_t *labels;
    // Their ids; 0 in generation.
    size_t n_labels;
    // The task, below the adapter's `n_tasks`, or the row of an engine's weights; unused without an
    // adapter.
    uint32_t task;
    // 0.
    uint32_t reserved;
} polytape_example;

// How tokens are generated: names, meaning and defaults of transformers' GenerationConfig. The defaults
// of polytape_generate_options_init are greedy; those of zeros are not allowed.
typedef struct polytape_generate_options {
    // sizeof(polytape_generate_options).
    size_t size;
    // At most this many tokens a row.
    size_t max_new_tokens;
    // No end token before this many.
    size_t min_new_tokens;
    // Sequences that a beam search follows; 1: no beam search.
    size_t num_beams;
    // Draws among this many of the most probable tokens; 0: among all.
    size_t top_k;
    // No so many tokens in a row occur twice; 0: they may.
    size_t no_repeat_ngram_size;
    // What draws are derived from, together with an example's index and a token's position.
    uint64_t seed;
    // Exponent of the length by which a beam's score is divided.
    double length_penalty;
    // Divides the scores before a draw.
    double temperature;
    // Draws among the most probable tokens that together have this probability.
    double top_p;
    // Draws among tokens of at least this share of the largest probability.
    double min_p;
    // Divides (where negative: multiplies) the scores of tokens that were there before.
    double repetition_penalty;
    // Not 0: draws tokens instead of taking the most probable.
    uint32_t do_sample;
    // When a beam search ends: a POLYTAPE_EARLY_STOPPING_.
    uint32_t early_stopping;
} polytape_generate_options;

// Sees each token as it is made: the example's index and the id. Not 0: stop. It runs in one of
// polytape's threads, one call at a time, and must return (no longjmp, no C++ exception). It must not
// wait for another thread's call on the same model: that may wait for this one.
typedef int (*polytape_on_token)(void *user, size_t example, uint32_t token);

// How kernels compute. All zero but `size` is the default.
typedef struct polytape_kernels_options {
    // sizeof(polytape_kernels_options).
    size_t size;
    // The POLYTAPE_DTYPE_ of activations: F32 (also where it is AUTO) or BF16.
    uint32_t dtype;
    // Threads; 0: one a core.
    uint32_t n_threads;
    // "scalar", "avx2", "avx512" or "amx"; null: what the environment variable POLYTAPE_ISA names, or
    // where it is not set the fastest that this CPU has.
    const char *isa;
} polytape_kernels_options;

// Routers: the arguments of polytape_route and polytape_route_backward.
typedef struct polytape_router {
    // sizeof(polytape_router).
    size_t size;
    // Parameters, [n_params]: somewhere in them each linear's router logits
    // [n_tasks, n_splits * n_skills].
    const float *params;
    // Their number.
    size_t n_params;
    // Where each linear's logits start, [n_linears].
    const size_t *logits;
    // Linears.
    size_t n_linears;
    // Rows of the router.
    size_t n_tasks;
    // Splits.
    size_t n_splits;
    // Skills.
    size_t n_skills;
    // The task of each routing row, [n_rows].
    const uint32_t *tasks;
    // Routing rows.
    size_t n_rows;
    // Uniform draws in [0, 1) of relaxed Bernoulli routing, [n_linears * n_rows, n_splits *
    // n_skills]; null: plain sigmoid, as in inference.
    const double *noise;
} polytape_router;

// A routed linear: y = x·Wᵀ + bias + (1/rank) x·Â·B̂, the pair Â, B̂ mixed for each routing row.
// Activations (x, y and their gradients) are of the kernels' dtype, row-major; all else is f32.
typedef struct polytape_routed_linear {
    // sizeof(polytape_routed_linear).
    size_t size;
    // Parameters, [n_params]: somewhere in them A [n_splits, n_skills, d_in / n_splits, rank] and
    // B [n_splits, n_skills, rank, d_out / n_splits], as PEFT has them.
    const float *params;
    // Their number.
    size_t n_params;
    // First element of A.
    size_t a_start;
    // First element of B.
    size_t b_start;
    // Input features.
    size_t d_in;
    // Output features.
    size_t d_out;
    // Rank.
    size_t rank;
    // Splits; divides both widths.
    size_t n_splits;
    // Skills.
    size_t n_skills;
    // Mixing weights, [n_rows, n_splits * n_skills].
    const float *mixing_weights;
    // Routing rows.
    size_t n_rows;
    // The number of tokens of each sequence, [n_sequences]; `n_tokens` below is their sum.
    const size_t *lens;
    // The routing row of each sequence, [n_sequences].
    const size_t *rows;
    // Sequences, one after the other.
    size_t n_sequences;
    // [n_tokens, d_in].
    const void *x;
    // The frozen weight, [d_out, d_in], at any alignment; null: the routed LoRA alone.
    const void *weight;
    // [d_out], of the weight's type; null: none.
    const void *bias;
    // The POLYTAPE_DTYPE_ of weight and bias: F32, BF16 or F16.
    uint32_t weight_dtype;
    // 0.
    uint32_t reserved;
} polytape_routed_linear;

// Where a backward leaves its gradients.
typedef struct polytape_routed_gradients {
    // sizeof(polytape_routed_gradients).
    size_t size;
    // Of A and B, [n_params] as the parameters; added to.
    float *params;
    // Of the mixing weights, [n_rows, n_splits * n_skills]; added to.
    float *mixing_weights;
    // Of x, [n_tokens, d_in]; null: it is not wanted.
    void *x;
    // Not 0: the gradient of x is added to what is there.
    uint32_t add_to_x;
    // 0.
    uint32_t reserved;
} polytape_routed_gradients;

// How a base is opened. All zero but `size` is the default.
typedef struct polytape_model_options {
    // sizeof(polytape_model_options).
    size_t size;
    // A POLYTAPE_DTYPE_ to compute in.
    uint32_t dtype;
    // Threads; 0: one a core.
    uint32_t n_threads;
    // Not 0: the weights are read into memory, so that what happens to the files later does not matter.
    uint32_t in_memory;
    // 0.
    uint32_t reserved;
} polytape_model_options;

// What a base is.
typedef struct polytape_model_info {
    // sizeof(polytape_model_info).
    size_t size;
    // Ids must be below.
    size_t vocab_size;
    // The most tokens of a sequence that the base has positions for; SIZE_MAX: any number.
    size_t max_positions;
    // The linears that an adapter may adapt.
    size_t n_linears;
    // 1 where there is a decoder only: labels follow the input. 0: an encoder reads the input.
    uint32_t is_causal;
    // The POLYTAPE_DTYPE_ that it computes in.
    uint32_t dtype;
    // Threads that compute.
    uint32_t n_threads;
    // 0.
    uint32_t reserved;
    // The instruction set: "scalar", "avx2", "avx512" or "amx". Valid while the model is.
    const char *isa;
} polytape_model_info;

// How an adapter is trained: with AdamW.
typedef struct polytape_train_config {
    // sizeof(polytape_train_config).
    size_t size;
    // Learning rate of A and B.
    double learning_rate;
    // Learning rate of the router logits.
    double router_learning_rate;
    // Decoupled weight decay of A and B.
    double weight_decay;
    // Decoupled weight decay of the router logits.
    double router_weight_decay;
    // Gradients are scaled down to this global norm; 0: never.
    double max_grad_norm;
    // Dropout of the base; negative: as its configuration says.
    double dropout;
    // Steps in which the rates rise from zero.
    uint64_t warmup_steps;
    // Steps in all, for the schedule.
    uint64_t max_steps;
    // What everything random is derived from.
    uint64_t seed;
    // Examples that are computed together; a step has one or more such micro-batches.
    size_t batch_size;
    // A POLYTAPE_SCHEDULE_.
    uint32_t schedule;
    // 0: the router takes the sigmoid; 1: it samples (relaxed Bernoulli); 2: it rounds its samples.
    uint32_t router_sampling;
    // Not 0: blocks run again in the backward instead of keeping their activations.
    uint32_t checkpointing;
    // 0.
    uint32_t reserved;
} polytape_train_config;

// What a step did.
typedef struct polytape_step_report {
    // sizeof(polytape_step_report).
    size_t size;
    // The step's number, from 1.
    uint64_t step;
    // Sum of the nll over the number of label tokens of the step, in nats, before the update.
    double loss;
    // Learning rate of A and B.
    double learning_rate;
    // Learning rate of the router logits.
    double router_learning_rate;
    // Global norm of the gradients, before clipping.
    double grad_norm;
    // Source and label tokens.
    uint64_t n_tokens;
} polytape_step_report;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// `POLYTAPE_ABI_VERSION` of the library: compare it with the header's.
uint32_t polytape_abi_version(void);

// The version of the library, as "0.1.0".
const char *polytape_version(void);

// PEFT's defaults. `size` is sizeof(polytape_adapter_config).
int32_t polytape_adapter_config_init(struct polytape_adapter_config *config, size_t size);

// A fresh adapter on a base, initialised as PEFT does.
int32_t polytape_adapter_new(const struct polytape_model *model,
                             const struct polytape_adapter_config *config,
                             uint64_t seed,
                             struct polytape_adapter **adapter);

// Loads a PEFT adapter folder onto a base.
int32_t polytape_adapter_open(const struct polytape_model *model,
                              const char *dir,
                              struct polytape_adapter **adapter);

// Saves an adapter as PEFT does. A crash leaves the adapter of before or the new one; where the folder
// has one of other names, routing or settings, perhaps none.
int32_t polytape_adapter_save(const struct polytape_adapter *adapter,
                              const char *dir);

// What an adapter is.
int32_t polytape_adapter_get_info(const struct polytape_adapter *adapter,
                                  struct polytape_adapter_info *info);

// The id of a task by its name, of an adapter whose folder has `tasks.json`.
int32_t polytape_adapter_find_task(const struct polytape_adapter *adapter,
                                   const char *name,
                                   uint32_t *task);

// Frees an adapter; null is fine. What was made from it goes on.
int32_t polytape_adapter_free(struct polytape_adapter *adapter);

// An engine for examples of these tasks, that decodes up to `capacity` of them at a time. The tasks
// (all of the adapter's where `tasks` is null) and the capacity fix how it computes: a row's bits do
// not depend on the rows beside it. `adapter` may be null: the base alone.
int32_t polytape_engine_new(const struct polytape_model *model,
                            const struct polytape_adapter *adapter,
                            const uint32_t *tasks,
                            size_t n_tasks,
                            size_t capacity,
                            struct polytape_engine **engine);

// An engine that routes by given mixing weights instead of the adapter's router: `weights` is
// [n_rows, n_splits, n_skills], the same for every linear, and `n_weights` their number. An example's
// task is its row.
int32_t polytape_engine_new_with_weights(const struct polytape_model *model,
                                         const struct polytape_adapter *adapter,
                                         const float *weights,
                                         size_t n_weights,
                                         size_t n_rows,
                                         size_t capacity,
                                         struct polytape_engine **engine);

// The nll of every label token of every example, in nats: `nll` is [labels of all examples], one
// example after the other, and `n_nll` their number.
int32_t polytape_engine_nll(const struct polytape_engine *engine,
                            const struct polytape_example *examples,
                            size_t n_examples,
                            double *nll,
                            size_t n_nll);

// The logits of every label token of every example: `logits` is [labels of all examples,
// vocabulary], and `n_logits` their number.
int32_t polytape_engine_logits(const struct polytape_engine *engine,
                               const struct polytape_example *examples,
                               size_t n_examples,
                               float *logits,
                               size_t n_logits);

// The defaults. `size` is sizeof(polytape_generate_options).
int32_t polytape_generate_options_init(struct polytape_generate_options *options, size_t size);

// A continuation of each example, by default the most probable one, token by token: `on_token` sees new
// tokens only, with the end token where one comes; those of a beam search at its end. Rows of
// different tasks step together. `options` may be null. Returns POLYTAPE_STOPPED where the callback
// said so, and POLYTAPE_BAD_INPUT where the base's files changed meanwhile: the tokens may be wrong.
int32_t polytape_engine_generate(const struct polytape_engine *engine,
                                 const struct polytape_example *examples,
                                 size_t n_examples,
                                 const struct polytape_generate_options *options,
                                 polytape_on_token on_token,
                                 void *user);

// Frees an engine; null is fine.
int32_t polytape_engine_free(struct polytape_engine *engine);

// Kernels on this CPU. `options` may be null.
int32_t polytape_kernels_new(const struct polytape_kernels_options *options,
                             struct polytape_kernels **kernels);

// Frees kernels; null is fine.
int32_t polytape_kernels_free(struct polytape_kernels *kernels);

// Mixing weights of every routing row in every linear: `weights` and `samples` are
// [n_linears * n_rows, n_splits * n_skills], `samples` what the backward wants beside.
int32_t polytape_route(const struct polytape_kernels *kernels,
                       const struct polytape_router *router,
                       float *weights,
                       float *samples);

// Adds the gradient of the router logits to `grads`, [n_params] as the parameters. `d_weights` is the
// gradient of the mixing weights; all three are [n_linears * n_rows, n_splits * n_skills].
int32_t polytape_route_backward(const struct polytape_kernels *kernels,
                                const struct polytape_router *router,
                                const float *weights,
                                const float *samples,
                                const float *d_weights,
                                float *grads);

// The forward. `y` is [n_tokens, d_out]; with `add` not 0 the result is added to what is in it. `z`
// [n_tokens, rank] is what the backward wants; null: it is not wanted.
// A routing row's A and B are mixed first, or its tokens go through all skills, whichever is less work
// for the numbers of tokens, routing rows and skills of the call. The two sum in another order, so a
// token's last bits may depend on how many are beside it. Those of an engine never do.
int32_t polytape_routed_linear_forward(const struct polytape_kernels *kernels,
                                       const struct polytape_routed_linear *linear,
                                       int32_t add,
                                       void *y,
                                       float *z);

// The backward. `linear` is as it was in the forward, `z` [n_tokens, rank] what the forward gave,
// `d_y` [n_tokens, d_out] the gradient of y.
int32_t polytape_routed_linear_backward(const struct polytape_kernels *kernels,
                                        const struct polytape_routed_linear *linear,
                                        const float *z,
                                        const void *d_y,
                                        const struct polytape_routed_gradients *gradients);

// Opens a Hugging Face model folder on the CPU. Weights are mapped, and read when they are used.
// `options` may be null.
int32_t polytape_model_open(const char *dir,
                            const struct polytape_model_options *options,
                            struct polytape_model **model);

// What a base is.
int32_t polytape_model_get_info(const struct polytape_model *model,
                                struct polytape_model_info *info);

// Fails with POLYTAPE_BAD_INPUT if a mapped file of the base was written to or truncated since it
// was opened: what was computed since may be wrong. To read a page that was cut off raises SIGBUS, which ends the
// process: open with `in_memory` where somebody may truncate the files.
int32_t polytape_model_verify(const struct polytape_model *model);

// Frees a base; null is fine. What was made from it goes on.
int32_t polytape_model_free(struct polytape_model *model);

// What went wrong in the last call of this thread that did not return POLYTAPE_OK, in UTF-8; empty
// where none has. Valid until the next call of this thread.
const char *polytape_last_error(void);

// The defaults. `size` is sizeof(polytape_train_config).
int32_t polytape_train_config_init(struct polytape_train_config *config, size_t size);

// Trains a copy of an adapter, which itself stays as it is.
int32_t polytape_trainer_new(const struct polytape_adapter *adapter,
                             const struct polytape_train_config *config,
                             struct polytape_trainer **trainer);

// One optimiser step over these examples, in micro-batches of the configured size. Where it fails
// with POLYTAPE_FAILED (the loss is not finite), everything is as before it. `report` may be null.
int32_t polytape_trainer_step(struct polytape_trainer *trainer,
                              const struct polytape_example *examples,
                              size_t n_examples,
                              struct polytape_step_report *report);

// The adapter as it is now: a copy, which further steps do not change.
int32_t polytape_trainer_get_adapter(const struct polytape_trainer *trainer,
                                     struct polytape_adapter **adapter);

// Frees a trainer; null is fine.
int32_t polytape_trainer_free(struct polytape_trainer *trainer);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* POLYTAPE_H */
