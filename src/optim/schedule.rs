//! Learning-rate schedules, as transformers defines them. Layer 6.
//!
//! Invariant: the rate is a function of the step number alone.

use crate::config::LearningRateSchedule;

/// The factor on the peak rate in optimizer step `step` (from 0) of `total`, after `warmup` steps
/// of linear rise. linear: falls to 0 at the end; cosine: half a cosine wave to 0; constant: 1 (no
/// warmup); constant_with_warmup.
pub fn factor(schedule: LearningRateSchedule, step: u64, warmup: u64, total: u64) -> f64 {
    let (step, warmup, total) = (step as f64, warmup as f64, total as f64);
    if schedule != LearningRateSchedule::Constant && step < warmup {
        return step / warmup.max(1.0);
    }
    match schedule {
        LearningRateSchedule::Constant | LearningRateSchedule::ConstantWithWarmup => 1.0,
        LearningRateSchedule::Linear => ((total - step) / (total - warmup).max(1.0)).max(0.0),
        LearningRateSchedule::Cosine => {
            let progress = (step - warmup) / (total - warmup).max(1.0);
            (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_rise_through_warmup_and_end_where_they_should() {
        assert_eq!(factor(LearningRateSchedule::Linear, 0, 0, 20), 1.0);
        assert_eq!(factor(LearningRateSchedule::Linear, 19, 0, 20), 0.05);
        assert_eq!(factor(LearningRateSchedule::Linear, 5, 10, 20), 0.5);
        assert_eq!(factor(LearningRateSchedule::Cosine, 10, 0, 20), 0.5);
        assert_eq!(factor(LearningRateSchedule::ConstantWithWarmup, 3, 4, 20), 0.75);
        assert_eq!(factor(LearningRateSchedule::Constant, 0, 4, 20), 1.0);
    }
}
