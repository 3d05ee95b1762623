//! Every op of the engine, a line each. Layer 4.
//!
//! Invariant: tests, `temper check`, benches and the docs are loops over this list.

use super::case::{
    Case, DEFAULT, ONE_DTYPE, OWN_MATMUL, PerfShape, Rng, SIMT, TENSOR_CORE, Variant,
};
use super::{
    activation, adamw, adamw8, add, attention, distill, dropout, embedding, head, lora, matmul,
    policy, preference, prompt, quant, rmsnorm, rope, sample, scale,
};

pub struct Entry {
    pub name: &'static str,
    /// The `.cu` files it uses.
    pub kernels: &'static [&'static str],
    pub cases: fn(&mut Rng) -> Vec<Case>,
    /// At least one, of the size that a model has.
    pub perf: fn(&mut Rng, &PerfShape) -> Vec<Case>,
    pub variants: &'static [Variant],
}

/// Every op of the engine.
pub fn registry() -> Vec<Entry> {
    type Perf = fn(&mut Rng, &PerfShape) -> Vec<Case>;
    let entry =
        |name, kernels, cases, perf: Perf, variants| Entry { name, kernels, cases, perf, variants };
    vec![
        entry(
            "activation",
            &["activation"],
            activation::plain_cases,
            activation::plain_perf,
            &[DEFAULT],
        ),
        entry("adamw", &["adamw"], adamw::cases, adamw::perf, &[DEFAULT]),
        entry("adamw8", &["adamw8", "quant"], adamw8::cases, adamw8::perf, &[DEFAULT]),
        entry("add", &["add"], add::cases, add::perf, &[DEFAULT]),
        entry(
            "distill",
            &["distill", "matmul", "preference"],
            distill::cases,
            distill::perf,
            &[DEFAULT, OWN_MATMUL],
        ),
        entry("dropout", &["dropout"], dropout::cases, dropout::perf, &[DEFAULT]),
        entry("embedding", &["embedding"], embedding::cases, embedding::perf, &[DEFAULT]),
        entry(
            "gather_rows",
            &["embedding"],
            embedding::gather_cases,
            embedding::gather_perf,
            &[DEFAULT],
        ),
        entry("glu", &["activation"], activation::cases, activation::perf, &[DEFAULT]),
        entry("head", &["head", "matmul"], head::cases, head::perf, &[DEFAULT, OWN_MATMUL]),
        entry("linear", &["matmul", "reduce"], matmul::cases, matmul::perf, &[DEFAULT, OWN_MATMUL]),
        entry(
            "lora_linear",
            &["lora", "matmul", "scale", "reduce"],
            lora::cases,
            lora::perf,
            &[DEFAULT, OWN_MATMUL],
        ),
        entry("preference", &["preference"], preference::cases, preference::perf, &[DEFAULT]),
        entry(
            "segment_sums",
            &["preference"],
            preference::segment_cases,
            preference::segment_perf,
            &[DEFAULT],
        ),
        entry("policy", &["policy"], policy::cases, policy::perf, &[ONE_DTYPE]),
        entry(
            "prompt_embedding",
            &["prompt", "embedding"],
            prompt::cases,
            prompt::perf,
            &[DEFAULT],
        ),
        entry("quantise", &["quant"], quant::cases, quant::perf, &[DEFAULT]),
        entry(
            "quant_linear",
            &["quant", "matmul", "reduce"],
            quant::linear_cases,
            quant::linear_perf,
            &[DEFAULT, OWN_MATMUL],
        ),
        entry("rmsnorm", &["rmsnorm", "reduce"], rmsnorm::cases, rmsnorm::perf, &[DEFAULT]),
        entry("rope", &["rope", "reduce"], rope::cases, rope::perf, &[DEFAULT]),
        entry("scale_columns", &["scale", "reduce"], scale::cases, scale::perf, &[DEFAULT]),
        entry("sample", &["sample"], sample::cases, sample::perf, &[DEFAULT]),
        entry("to_float", &["add"], add::to_float_cases, add::to_float_perf, &[DEFAULT]),
        entry(
            "attention",
            &["attention", "attention_mma"],
            attention::cases,
            attention::perf,
            &[SIMT, TENSOR_CORE],
        ),
        entry(
            "attention_paged",
            &["attention", "attention_mma"],
            attention::paged_cases,
            attention::paged_perf,
            &[SIMT, TENSOR_CORE],
        ),
        entry(
            "kv_append",
            &["attention"],
            attention::append_cases,
            attention::append_perf,
            &[DEFAULT],
        ),
    ]
}
