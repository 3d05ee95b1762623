//! Options of what is trained: the whole model, parts of it, or an adapter beside it. Layer 1.
//!
//! Invariant: names and defaults are those of trl 1.16.0's `ModelConfig`, and of peft 0.19.1 where
//! TRL has no such option; an option of ours says so in its doc.

use super::value::words;
use super::{Report, section};

words! {
    pub enum PeftType {
        Lora = "lora" | "LORA",
        Ia3 = "ia3" | "IA3",
        PromptTuning = "prompt_tuning" | "PROMPT_TUNING",
        SeqBn = "seq_bn" | "pfeiffer",
        DoubleSeqBn = "double_seq_bn" | "houlsby",
        ParBn = "par_bn" | "parallel",
    }
}

words! {
    /// Which biases a LoRA run trains.
    pub enum LoraBias {
        None = "none",
        All = "all",
        LoraOnly = "lora_only",
    }
}

words! {
    pub enum Quantisation {
        Nf4 = "nf4",
    }
}

section! {
    /// Keys of what is trained, common to all methods.
    pub struct PeftConfig = "adapters and tuning" {
        /// Train an adapter and leave the model's weights as they are.
        pub use_peft: bool = false,
        /// Ours. The kind of adapter: LoRA, IA3, prompt tuning, or a bottleneck adapter (seq_bn:
        /// Pfeiffer, double_seq_bn: Houlsby, par_bn: parallel).
        pub peft_type: PeftType = PeftType::Lora,
        /// Rank of LoRA's matrices.
        pub lora_r: usize = 16,
        /// Scale of LoRA's product: lora_alpha / lora_r.
        pub lora_alpha: f64 = 32.0,
        /// Dropout on LoRA's input. Projections that share an input share its mask.
        pub lora_dropout: f64 = 0.05,
        /// Names of the projections (with LoRA also embed_tokens and lm_head), all-linear, or a
        /// regular expression (text with one of ^ $ * + ? ( [ |) over whole module names. none: the
        /// family's default (LoRA: q_proj, v_proj, or qkv_proj).
        pub lora_target_modules: Option<Vec<String>> = None,
        /// Modules to train in full beside the adapter and save with it: embed_tokens, lm_head,
        /// score, norm.
        pub lora_modules_to_save: Option<Vec<String>> = None,
        /// PEFT's. Keep a tied head tied to the embedding where lora_modules_to_save names one of
        /// them.
        pub ensure_weight_tying: bool = false,
        /// Scale by lora_alpha / sqrt(lora_r).
        pub use_rslora: bool = false,
        /// Use DoRA: LoRA plus a trained length for each row of the weight.
        pub use_dora: bool = false,
        /// PEFT's. Biases to train: none, all, or those of layers with LoRA.
        pub bias: LoraBias = LoraBias::None,
        /// PEFT's. Layers that get an adapter. none: all.
        pub layers_to_transform: Option<Vec<usize>> = None,
        /// PEFT's. Other ranks for some modules: pattern=rank, ...
        pub rank_pattern: Option<Vec<String>> = None,
        /// PEFT's. Other alphas for some modules: pattern=alpha, ...
        pub alpha_pattern: Option<Vec<String>> = None,
        /// PEFT's. true: A random, B zero; gaussian; pissa; pissa_niter_N; false: both random.
        pub init_lora_weights: String = "true".into(),
        /// LoRA+: B's learning rate over A's. none: one rate.
        pub loraplus_lr_ratio: Option<f64> = None,
        /// PEFT's, for IA3. Targets whose input is scaled instead of their output. none: the last
        /// projection of the MLP (down_proj).
        pub feedforward_modules: Option<Vec<String>> = None,
        /// PEFT's, for prompt tuning. Length of the tuned prompt in tokens.
        pub num_virtual_tokens: usize = 20,
        /// PEFT's, for prompt tuning. Initialise the prompt with the embeddings of this text. none:
        /// random.
        pub prompt_tuning_init_text: Option<String> = None,
        /// adapter-hub's. Hidden size divided by bottleneck size. none: 16 (par_bn: 2).
        pub reduction_factor: Option<f64> = None,
        /// adapter-hub's. relu, swish or gelu. none: relu (double_seq_bn: swish).
        pub non_linearity: Option<String> = None,
        /// Ours. Parameters to freeze in full fine-tuning: regular expressions over their names.
        pub freeze: Option<Vec<String>> = None,
        /// Ours. Factors on the learning rate of some parameters in full fine-tuning:
        /// pattern=factor, ... The first match counts.
        pub lr_multipliers: Option<Vec<String>> = None,
        /// Hold the frozen base weights in 4 bits (QLoRA).
        pub load_in_4bit: bool = false,
        /// Hold the frozen base weights in 8 bits.
        pub load_in_8bit: bool = false,
        /// The 4-bit number format.
        pub bnb_4bit_quant_type: Quantisation = Quantisation::Nf4,
        /// Quantise the scales of the 4-bit blocks too.
        pub use_bnb_nested_quant: bool = false,
    }
}

impl PeftConfig {
    fn rules(&self, report: &mut Report) {
        let lora = self.use_peft && self.peft_type == PeftType::Lora;
        if lora {
            report.must(self.lora_r >= 1, || {
                "lora_r = 0: an adapter of rank 0 learns nothing; give at least 1".into()
            });
            report.must(self.lora_alpha > 0.0, || {
                format!("lora_alpha = {}: must be above 0", self.lora_alpha)
            });
        }
        let p = self.lora_dropout;
        report.must((0.0..1.0).contains(&p), || {
            format!("lora_dropout = {p}: must be at least 0 and below 1")
        });
        report.must(self.loraplus_lr_ratio.is_none_or(|r| r > 0.0), || {
            "loraplus_lr_ratio: must be above 0".into()
        });
        report.must(!(self.load_in_4bit && self.load_in_8bit), || {
            "load_in_4bit and load_in_8bit cannot be combined: set only one".into()
        });
        if !self.use_peft {
            for key in [
                "peft_type",
                "lora_r",
                "lora_alpha",
                "lora_dropout",
                "lora_target_modules",
                "lora_modules_to_save",
                "ensure_weight_tying",
                "use_rslora",
                "use_dora",
                "bias",
                "layers_to_transform",
                "rank_pattern",
                "alpha_pattern",
                "init_lora_weights",
                "loraplus_lr_ratio",
                "feedforward_modules",
                "num_virtual_tokens",
                "prompt_tuning_init_text",
                "reduction_factor",
                "non_linearity",
            ] {
                report.idle(key, "use_peft", "use_peft is false");
            }
            report.must(!self.load_in_4bit && !self.load_in_8bit, || {
                "load_in_4bit, load_in_8bit: quantised weights cannot be trained; set use_peft=true".into()
            });
        } else {
            report.idle("freeze", "use_peft", "use_peft is true: the whole base is frozen");
            report.idle(
                "lr_multipliers",
                "use_peft",
                "use_peft is true; loraplus_lr_ratio sets the ratio of LoRA+",
            );
        }
        if self.use_peft && !lora {
            for key in [
                "lora_r",
                "lora_alpha",
                "lora_dropout",
                "use_rslora",
                "use_dora",
                "bias",
                "init_lora_weights",
            ] {
                report.idle(key, "peft_type", "peft_type is not lora");
            }
        }
        let targeted = lora || self.peft_type == PeftType::Ia3;
        let bottleneck =
            matches!(self.peft_type, PeftType::SeqBn | PeftType::DoubleSeqBn | PeftType::ParBn);
        for (keys, on, why) in [
            (
                &[
                    "layers_to_transform",
                    "rank_pattern",
                    "alpha_pattern",
                    "loraplus_lr_ratio",
                    "ensure_weight_tying",
                ][..],
                lora,
                "peft_type is not lora",
            ),
            (&["feedforward_modules"], self.peft_type == PeftType::Ia3, "peft_type is not ia3"),
            (
                &["lora_target_modules", "lora_modules_to_save"],
                targeted,
                "peft_type is neither lora nor ia3",
            ),
            (
                &["num_virtual_tokens", "prompt_tuning_init_text"],
                self.peft_type == PeftType::PromptTuning,
                "peft_type is not prompt_tuning",
            ),
            (
                &["reduction_factor", "non_linearity"],
                bottleneck,
                "peft_type is not a bottleneck adapter",
            ),
        ] {
            if self.use_peft && !on {
                keys.iter().for_each(|key| report.idle(key, "peft_type", why));
            }
        }
    }
}
