//! Options of Muon beside those of every optimizer. Layer 1.
//!
//! Invariant: names after the prefix `muon_` and defaults are those of `torch.optim.Muon`, torch
//! 2.11.

use super::value::words;
use super::{Report, section};

words! {
    /// How the learning rate of a matrix depends on its shape.
    pub enum MuonAdjust {
        /// sqrt(max(1, rows / columns)).
        Original = "original",
        /// 0.2 sqrt(max(rows, columns)): with this, AdamW's learning rate and weight decay can be
        /// used.
        MatchRmsAdamw = "match_rms_adamw",
    }
}

section! {
    /// Options of `optim=muon`.
    pub struct MuonOptions = "muon" {
        /// Ours. Peak learning rate of the matrices that Muon trains; the rest use learning_rate.
        /// Both follow one schedule. none: learning_rate.
        pub muon_learning_rate: Option<f64> = None,
        /// Ours. Decay rate of the running mean of gradients.
        pub muon_momentum: f64 = 0.95,
        /// Ours. Mix the gradient into the running mean before it is orthogonalised.
        pub muon_nesterov: bool = true,
        /// Ours. Newton-Schulz steps.
        pub muon_ns_steps: usize = 5,
        /// Ours. Factor on a matrix's learning rate. original: sqrt(max(1, rows / columns)).
        /// match_rms_adamw: 0.2 sqrt(max(rows, columns)), for learning rates that suit AdamW.
        pub muon_adjust_lr_fn: MuonAdjust = MuonAdjust::Original,
    }
}

impl MuonOptions {
    fn rules(&self, report: &mut Report) {
        let momentum = self.muon_momentum;
        report.must((0.0..1.0).contains(&momentum), || {
            format!("muon_momentum = {momentum}: must be at least 0 and below 1")
        });
        let rate = self.muon_learning_rate;
        report.must(rate.is_none_or(|rate| rate >= 0.0), || {
            format!("muon_learning_rate = {}: must not be negative", rate.unwrap_or_default())
        });
        let steps = self.muon_ns_steps;
        report.must((1..100).contains(&steps), || {
            format!("muon_ns_steps = {steps}: must be from 1 to 99")
        });
    }

    /// Records that none of these options has an effect.
    pub(super) fn idle(report: &mut Report) {
        for key in [
            "muon_learning_rate",
            "muon_momentum",
            "muon_nesterov",
            "muon_ns_steps",
            "muon_adjust_lr_fn",
        ] {
            report.idle(key, "optim", "optim is not \"muon\"");
        }
    }
}
