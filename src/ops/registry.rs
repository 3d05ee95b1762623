//! Every op of the engine, a line each. Layer 4.
//!
//! Invariant: tests, `temper check`, benches and the docs are loops over this list.

use super::case::{Case, DEFAULT, ONE_DTYPE, OWN_MATMUL, Rng, SIMT, TENSOR_CORE, Variant};
use super::{
    activation, adamw, adamw8, add, attention, distill, dropout, embedding, head, lora, matmul,
    policy, preference, prompt, quant, rmsnorm, rope, sample, scale,
};

pub struct Entry {
    pub name: &'static str,
    /// The `.cu` files it uses.
    pub kernels: &'static [&'static str],
    pub cases: fn(&mut Rng) -> Vec<Case>,
    pub variants: &'static [Variant],
}

/// Every op of the engine.
pub fn registry() -> Vec<Entry> {
    let entry = |name, kernels, cases, variants| Entry { name, kernels, cases, variants };
    vec![
        entry("activation", &["activation"], activation::plain_cases, &[DEFAULT]),
        entry("adamw", &["adamw"], adamw::cases, &[DEFAULT]),
        entry("adamw8", &["adamw8", "quant"], adamw8::cases, &[DEFAULT]),
        entry("add", &["add"], add::cases, &[DEFAULT]),
        entry(
            "distill",
            &["distill", "matmul", "preference"],
            distill::cases,
            &[DEFAULT, OWN_MATMUL],
        ),
        entry("dropout", &["dropout"], dropout::cases, &[DEFAULT]),
        entry("embedding", &["embedding"], embedding::cases, &[DEFAULT]),
        entry("gather_rows", &["embedding"], embedding::gather_cases, &[DEFAULT]),
        entry("glu", &["activation"], activation::cases, &[DEFAULT]),
        entry("head", &["head", "matmul"], head::cases, &[DEFAULT, OWN_MATMUL]),
        entry("linear", &["matmul", "reduce"], matmul::cases, &[DEFAULT, OWN_MATMUL]),
        entry(
            "lora_linear",
            &["lora", "matmul", "scale", "reduce"],
            lora::cases,
            &[DEFAULT, OWN_MATMUL],
        ),
        entry("preference", &["preference"], preference::cases, &[DEFAULT]),
        entry("segment_sums", &["preference"], preference::segment_cases, &[DEFAULT]),
        entry("policy", &["policy"], policy::cases, &[ONE_DTYPE]),
        entry("prompt_embedding", &["prompt", "embedding"], prompt::cases, &[DEFAULT]),
        entry("quantise", &["quant"], quant::cases, &[DEFAULT]),
        entry(
            "quant_linear",
            &["quant", "matmul", "reduce"],
            quant::linear_cases,
            &[DEFAULT, OWN_MATMUL],
        ),
        entry("rmsnorm", &["rmsnorm", "reduce"], rmsnorm::cases, &[DEFAULT]),
        entry("rope", &["rope", "reduce"], rope::cases, &[DEFAULT]),
        entry("scale_columns", &["scale", "reduce"], scale::cases, &[DEFAULT]),
        entry("sample", &["sample"], sample::cases, &[DEFAULT]),
        entry("to_float", &["add"], add::to_float_cases, &[DEFAULT]),
        entry("attention", &["attention", "attention_mma"], attention::cases, &[SIMT, TENSOR_CORE]),
        entry(
            "attention_paged",
            &["attention", "attention_mma"],
            attention::paged_cases,
            &[SIMT, TENSOR_CORE],
        ),
        entry("kv_append", &["attention"], attention::append_cases, &[DEFAULT]),
    ]
}
