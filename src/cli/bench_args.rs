//! The options of `temper bench`. Layer 9.
//!
//! Invariant: the text of an option names its benches, unless all have it.

use super::args::{Where, choice};
use super::bench_grpo::GrpoArgs;
use super::parsers::{count, recompute};
use crate::autograd::Recompute;
use crate::config::MatmulChoice;

/// Measure ops, training steps, decoding, GRPO steps and the kernels of the course
///
/// Ops are compared with the copy and matmul speeds that the command measures on the same device;
/// models have random weights of a real shape.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// what to measure. levels: the matrix products and attentions of kernels/levels, from the
    /// definition to a fast kernel (on a CPU for correctness only). launches: the host's time for
    /// each launch of a training step, on a stand-in for a GPU, whatever --device says
    #[arg(value_parser = ["ops", "train", "decode", "grpo", "levels", "launches"])]
    pub(super) what: String,
    /// quickstart, smollm2-135m, qwen2.5-0.5b, qwen3-0.6b, llama-3.2-1b, qwen2.5-1.5b,
    /// qwen3-1.7b
    #[arg(long, default_value = "quickstart")]
    pub(super) shape: String,
    /// rows of a micro-batch (train, grpo), sequences (decode)
    #[arg(long, default_value_t = 16, value_parser = count)]
    pub(super) batch: usize,
    /// ops, train, decode: tokens of a row
    #[arg(long, default_value_t = 128, value_parser = count)]
    pub(super) length: usize,
    /// timed repetitions, whose median is reported; if absent 10, for grpo 3
    #[arg(long, value_parser = count)]
    pub(super) repeat: Option<usize>,
    /// train, grpo: LoRA of this rank on all seven projections, without dropout, instead of full
    /// fine-tuning
    #[arg(long, value_parser = count)]
    pub(super) lora: Option<usize>,
    /// train, grpo, with --lora: hold the base in 4 bits (nf4), 4 bits with quantised scales (nf4-nested)
    /// or 8 bits (int8)
    #[arg(long, requires = "lora")]
    pub(super) base: Option<String>,
    /// train: sft, or dpo with pairs of --length tokens a side, the first half of which is a common
    /// prompt
    #[arg(long, default_value = "sft", value_parser = ["sft", "dpo"])]
    pub(super) method: String,
    /// which matrix products to use: auto, library, exact or own
    #[arg(long, default_value = "auto", value_parser = choice::<MatmulChoice>)]
    pub(super) matmul: MatmulChoice,
    /// recompute activations in the backward pass: light (outputs of norms and activations) or
    /// layers (the default without a value)
    #[arg(long, num_args = 0..=1, default_missing_value = "layers", value_parser = recompute)]
    pub(super) recompute: Option<Recompute>,
    #[command(flatten)]
    pub(super) grpo: GrpoArgs,
    /// one JSON object on standard output
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) on: Where,
}

impl BenchArgs {
    pub(super) fn repeat(&self) -> usize {
        self.repeat.unwrap_or(10)
    }
}
