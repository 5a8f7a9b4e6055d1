// A decoder of the common shape: token ids in, logits out, for rows of any number of sequences.
//
// A step is: decoder_begin; for each layer decoder_attend and, in MoE layers, decoder_experts for
// the chosen experts, in any order and number of calls, and decoder_combine; decoder_logits. Where
// every expert is in memory decoder_step does all of it.
#pragma once
#include "attention.h"
#include "native.h"
#include "router.h"

using moekit::KvShape;
using moekit::Row;
using moekit::Router;

#pragma GCC visibility push(default)
extern "C" {

struct Linear {
    const Format* format;
    const void* data;
    const float* bias;  // [rows] or null
};

struct DecoderLayer {
    const float *before_attention, *after_attention;  // norms [D], null where there is none
    const float *before_mlp, *after_mlp;
    Linear q, k, v, o;
    // Latent attention: q (if q_a is there) is applied to normalised latents of q_a, and those of kv_a
    // are keys and values, so k and v are not there. For each head k_heads [kv_latent, head_dim
    // without what is rotated] turns a query into one of latents, and v_heads [value_dim, kv_latent]
    // what attention gives into the head's output.
    Linear q_a, kv_a;
    const Linear *k_heads, *v_heads;
    const float *q_a_norm, *kv_a_norm;
    const float *q_norm, *k_norm;  // [head_dim], or as wide as the projection; null: none
    const float* sinks;            // [heads] or null
    const float *cos, *sin;        // [positions, rotary / 2]; null: no rotation
    int32_t window;                // positions that are seen; 0: all
    int32_t moe;                   // which MoE layer this is; -1: none
    Router router;
    // The dense MLP, or what a MoE layer applies to every token; format null: none.
    const ExpertFormat* shared_format;
    const void* shared;
    const float* shared_gate;                // [D] or null: its sigmoid weighs the shared output
    const ExpertFormat* const* expert_formats;  // [experts]
};

struct DecoderModel {
    int32_t width, vocab, layers, heads, kv_heads, head_dim, value_dim;
    int32_t rotary_half, rotary_in_pairs;
    int32_t q_latent, kv_latent;  // widths of latents; 0: none
    int32_t norm_is_wide;        // q and k are normalised over all heads at once
    int32_t norm_after_rotation;
    int32_t kv_is_bf16, embedding_is_bf16, max_rows;
    float eps, latent_eps, attention_scale, embedding_scale, residual_scale, logit_scale, clip_qkv;
    const void* embedding;    // [vocab, D]
    const float* final_norm;  // [D]
    Linear head;
    const DecoderLayer* layer;  // [layers]
};

struct Decoder;

// Copies the model, not the weights; `pool` and all memory must outlive the decoder.
Decoder* decoder_new(const DecoderModel* model, Pool* pool);
void decoder_free(Decoder*);
// Bytes that a decoder holds for steps of up to max_rows rows.
int64_t decoder_scratch(const DecoderModel* model);
KvShape decoder_kv(const DecoderModel* model);

// Gives a layer longer tables of angles.
void decoder_rotation(Decoder*, int32_t layer, const float* cos, const float* sin);

// Starts a step of T <= max_rows rows: their embeddings. Rows of a sequence follow each other.
void decoder_begin(Decoder*, const Row* rows, int32_t T);
// Attention and, in a MoE layer, the router; other layers are completed.
void decoder_attend(Decoder*, int32_t layer);
// What the router of the last MoE layer chose, [T, K], and the hidden state that it saw, [T, D].
const int32_t* decoder_ids(const Decoder*);
const float* decoder_weights(const Decoder*);
const float* decoder_hidden(const Decoder*);
// The logits of the router of the last MoE layer, [T, experts]; once they are changed,
// decoder_choose chooses anew.
float* decoder_scores(Decoder*);
void decoder_choose(Decoder*, int32_t layer);
// Applies these experts, of the addresses given, to the rows that chose them; `formats` [experts]
// in place of the layer's, null for those. The first call also applies the shared experts.
void decoder_experts(Decoder*, int32_t layer, const int32_t* experts, const uint64_t* addresses,
                     int32_t count, const ExpertFormat* const* formats);
// Adds up, always in the order of the choice. To be called when all chosen experts are done.
void decoder_combine(Decoder*, int32_t layer);
// logits [count, vocab] of these rows.
void decoder_logits(Decoder*, const int32_t* rows, int32_t count, float* logits);

// A whole step; addresses [MoE layers, experts] has no zeros.
void decoder_step(Decoder*, const Row* rows, int32_t T, const uint64_t* addresses,
                  const int32_t* logit_rows, int32_t count, float* logits);

// Router logits [T, experts] of a layer for any hidden states [T, D].
void decoder_router_logits(Decoder*, int32_t layer, const float* hidden, int32_t T, float* logits);

// Seconds spent since the start, by stage: see decoder.py.
const double* decoder_seconds(const Decoder*);

}
#pragma GCC visibility pop
