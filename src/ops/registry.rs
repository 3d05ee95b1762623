//! Every op of the engine, one line each. Layer 4.
//!
//! Invariant: tests, `temper check`, benches and the docs are loops over this list.

use super::case::{
    Case, DEFAULT, ONE_DTYPE, OWN_MATMUL, PerfShape, Rng, SIMT, TENSOR_CORE, Variant, WGMMA,
};
use super::preference::{segment_cases, segment_perf};
use super::quant::{linear_cases, linear_perf};
use super::{
    activation, adamw, adamw8, add, attention, cache, distill, dropout, embedding, head,
    linear_glu, lora, matmul, mlp, muon, norm_linear, policy, preference, prompt, quant, rmsnorm,
    rope, rope_append, sample, scale, short_conv, short_conv_paged, tokens,
};

pub struct Entry {
    pub name: &'static str,
    /// The `.cu` files it uses.
    pub kernels: &'static [&'static str],
    pub cases: fn(&mut Rng) -> Vec<Case>,
    /// At least one, at a model's size.
    pub perf: fn(&mut Rng, &PerfShape) -> Vec<Case>,
    pub variants: &'static [Variant],
}

/// Every op of the engine.
pub fn registry() -> Vec<Entry> {
    const PLAIN: &[Variant] = &[DEFAULT];
    const GEMM: &[Variant] = &[DEFAULT, OWN_MATMUL];
    const FAMILIES: &[Variant] = &[SIMT, TENSOR_CORE, WGMMA];
    const MMA: &[&str] =
        &["attention", "attention_mma", "attention_hopper", "attention_hopper_bwd"];
    const DECODE: &[&str] = &["attention", "attention_mma", "attention_decode", "rope"];
    const LINEAR: &[&str] =
        &["matmul", "matmul_few", "matmul_few_hopper", "matmul_hopper", "reduce"];
    const LORA: &[&str] = &["lora", "lora_hopper", "matmul", "matmul_few", "scale", "reduce"];
    const LINEAR_GLU: &[&str] = &[
        "matmul",
        "matmul_few",
        "matmul_few_hopper",
        "matmul_hopper",
        "linear_glu_hopper",
        "activation",
        "reduce",
    ];
    const NORM_LINEAR: &[&str] = &["matmul_few_hopper", "rmsnorm", "matmul_few", "activation"];
    const PROMPT: &[&str] = &["prompt", "embedding", "scale"];
    const DISTILL: &[&str] = &["distill", "head", "matmul", "preference"];
    type Perf = fn(&mut Rng, &PerfShape) -> Vec<Case>;
    let op =
        |name, kernels, cases, perf: Perf, variants| Entry { name, kernels, cases, perf, variants };
    vec![
        op("activation", &["activation"], activation::plain_cases, activation::plain_perf, PLAIN),
        op("adamw", &["adamw"], adamw::cases, adamw::perf, PLAIN),
        op("adamw8", &["adamw8", "quant"], adamw8::cases, adamw8::perf, PLAIN),
        op("add", &["add"], add::cases, add::perf, PLAIN),
        op("copy_cached", &["cache"], cache::cases, cache::perf, PLAIN),
        op("distill", DISTILL, distill::cases, distill::perf, GEMM),
        op("dropout", &["dropout"], dropout::cases, dropout::perf, PLAIN),
        op("embedding", &["embedding"], embedding::cases, embedding::perf, PLAIN),
        op("gather_rows", &["embedding"], embedding::gather_cases, embedding::gather_perf, PLAIN),
        op("glu", &["activation"], activation::cases, activation::perf, PLAIN),
        op("head", &["head", "matmul"], head::cases, head::perf, GEMM),
        op("linear", LINEAR, matmul::cases, matmul::perf, GEMM),
        op("linear_glu", LINEAR_GLU, linear_glu::cases, linear_glu::perf, GEMM),
        op("lora_linear", LORA, lora::cases, lora::perf, GEMM),
        op("mlp", LINEAR_GLU, mlp::cases, mlp::perf, GEMM),
        op("norm_linear", NORM_LINEAR, norm_linear::cases, norm_linear::perf, GEMM),
        op("muon", &["muon", "matmul"], muon::cases, muon::perf, GEMM),
        op(
            "orthogonalise",
            &["muon", "matmul"],
            muon::orthogonalise_cases,
            muon::orthogonalise_perf,
            GEMM,
        ),
        op("preference", &["preference"], preference::cases, preference::perf, PLAIN),
        op("segment_sums", &["preference"], segment_cases, segment_perf, PLAIN),
        op("multiply", &["scale"], scale::multiply_cases, scale::multiply_perf, PLAIN),
        op("policy", &["policy"], policy::cases, policy::perf, &[ONE_DTYPE]),
        op("prompt_embedding", PROMPT, prompt::cases, prompt::perf, PLAIN),
        op("quantise", &["quant"], quant::cases, quant::perf, PLAIN),
        op("quant_linear", &["quant", "matmul", "reduce"], linear_cases, linear_perf, GEMM),
        op("rmsnorm", &["rmsnorm", "reduce"], rmsnorm::cases, rmsnorm::perf, PLAIN),
        op("rope", &["rope", "reduce"], rope::cases, rope::perf, PLAIN),
        op("rope_append", &["rope"], rope_append::cases, rope_append::perf, PLAIN),
        op("scale_columns", &["scale", "reduce"], scale::cases, scale::perf, PLAIN),
        op("sample", &["sample"], sample::cases, sample::perf, PLAIN),
        op("short_conv", &["short_conv", "reduce"], short_conv::cases, short_conv::perf, PLAIN),
        op(
            "short_conv_paged",
            &["short_conv"],
            short_conv_paged::cases,
            short_conv_paged::perf,
            PLAIN,
        ),
        op("take_tokens", &["tokens"], tokens::take_cases, tokens::take_perf, PLAIN),
        op("keep_tokens", &["tokens"], tokens::keep_cases, tokens::keep_perf, PLAIN),
        op("to_float", &["add"], add::to_float_cases, add::to_float_perf, PLAIN),
        op("attention", MMA, attention::cases, attention::perf, FAMILIES),
        op(
            "attention_decode",
            DECODE,
            attention::decode_cases,
            attention::decode_perf,
            &[SIMT, TENSOR_CORE],
        ),
        op("attention_paged", MMA, attention::paged_cases, attention::paged_perf, FAMILIES),
    ]
}
