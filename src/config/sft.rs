//! Keys of supervised fine-tuning: TRL's `SFTConfig`. Layer 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are TRL's.

use super::value::words;
use super::{MethodSection, Report, TrainingConfig, section};

words! {
    pub enum TruncationMode {
        KeepStart = "keep_start",
        KeepEnd = "keep_end",
    }
}

words! {
    pub enum PackingStrategy {
        Bfd = "bfd",
        BfdSplit = "bfd_split" | "bfd-requeue",
        Wrapped = "wrapped",
    }
}

words! {
    pub enum OnTruncation {
        Truncate = "truncate",
        Drop = "drop",
        Error = "error",
    }
}

words! {
    pub enum SftLoss {
        Nll = "nll" | "chunked_nll",
    }
}

section! {
    /// Keys of `temper sft`, beside the common ones.
    pub struct SftConfig {
        /// Tokens of a row at most; with packing, the length of a pack. none: no limit.
        pub max_length: Option<usize> = Some(1024),
        /// Which end of a row longer than max_length is kept.
        pub truncation_mode: TruncationMode = TruncationMode::KeepStart,
        /// Ours. What happens to a row longer than max_length (TRL: truncate). error names the row.
        pub on_truncation: OnTruncation = OnTruncation::Truncate,
        /// Put several rows into one sequence of max_length; they do not see each other (but:
        /// wrapped).
        pub packing: bool = false,
        /// bfd: best fit, long rows lose their end; bfd_split: long rows are split; wrapped: cut
        /// anywhere.
        pub packing_strategy: PackingStrategy = PackingStrategy::Bfd,
        /// Loss on the completion only. none: yes for prompt-completion rows, no for others.
        pub completion_only_loss: Option<bool> = None,
        /// Loss on assistant turns only; the chat template must mark them with {% generation %}.
        pub assistant_only_loss: bool = false,
        /// The field of plain-text rows.
        pub dataset_text_field: String = "text".into(),
        /// nll: mean negative log-likelihood of the target tokens.
        pub loss_type: SftLoss = SftLoss::Nll,
        /// The token that ends a row. none: the tokenizer's.
        pub eos_token: Option<String> = None,
        /// A Jinja file, or a folder with a tokenizer, whose chat template replaces the model's.
        pub chat_template_path: Option<String> = None,
    }
}

impl MethodSection for SftConfig {
    const NAME: &'static str = "sft";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 2e-5, ..Default::default() }
    }
}

impl SftConfig {
    fn rules(&self, report: &mut Report) {
        if let Some(length @ (0 | 1)) = self.max_length {
            report.problem(format!(
                "max_length = {length}: a row needs at least 2 tokens, one to predict from and one to predict"
            ));
        }
        if self.packing && self.max_length.is_none() {
            report.problem(
                "packing = true needs max_length, the length of a pack; it is \"none\"".into(),
            );
        }
        if self.packing && self.truncation_mode == TruncationMode::KeepEnd {
            report.problem(
                "truncation_mode = \"keep_end\" and packing = true: packing cuts from the end only"
                    .into(),
            );
        }
        if self.packing
            && self.packing_strategy != PackingStrategy::Bfd
            && self.on_truncation != OnTruncation::Truncate
        {
            report.problem(
                "on_truncation: this packing_strategy never drops a long row, it splits it; leave it at \"truncate\""
                    .into(),
            );
        }
        if self.max_length.is_none() {
            report.idle("truncation_mode", "max_length", "max_length is \"none\"");
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}
