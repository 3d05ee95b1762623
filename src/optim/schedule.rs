//! Learning-rate schedules as in transformers. Layer 6.
//!
//! Invariant: the rate is a function of the step number alone, so a resumed run has the rates of an
//! uninterrupted one. The operations and their order are those of transformers 5.17.

use std::f64::consts::PI;

use crate::config::{LearningRateSchedule as Kind, RampShape, ScheduleArguments, TrainingConfig};
use crate::error::{Error, Result};

/// The learning rate of every step of a run.
#[derive(Clone, Debug)]
pub struct Schedule {
    kind: Kind,
    arguments: ScheduleArguments,
    peak: f64,
    warmup: f64,
    total: f64,
}

impl Schedule {
    /// The schedule of a run of `total` steps with this peak rate. Error: invalid arguments of the
    /// schedule.
    pub fn of(training: &TrainingConfig, peak: f64, total: u64) -> Result<Schedule> {
        let kind = training.lr_scheduler_type;
        Ok(Schedule {
            kind,
            arguments: training.schedule_arguments().map_err(Error::Config)?,
            peak,
            warmup: training.warmup_steps.of(total) as f64,
            total: total as f64,
        })
    }

    /// The rate of optimizer step `step` (from 0).
    pub fn rate(&self, step: u64) -> f64 {
        self.peak * self.factor(step as f64)
    }

    /// The factor on the peak rate. Warmup rises linearly from 0, unless the schedule defines
    /// another.
    fn factor(&self, step: f64) -> f64 {
        let (a, warmup, total) = (&self.arguments, self.warmup, self.total);
        match self.kind {
            Kind::Constant => return 1.0,
            Kind::WarmupStableDecay => return self.stable_then_decay(step),
            Kind::CosineWarmupWithMinLr if step < warmup => {
                return match a.warmup_lr_rate {
                    None => (step + 1.0) / warmup.max(1.0),
                    Some(from) => from + (1.0 - from) * step / (warmup - 1.0).max(1.0),
                };
            }
            _ if step < warmup => return step / warmup.max(1.0),
            _ => {}
        }
        let rest = (total - warmup).max(1.0);
        let progress = (step - warmup) / rest;
        let wave = |progress: f64| 0.5 * (1.0 + (PI * a.num_cycles * 2.0 * progress).cos());
        match self.kind {
            Kind::Linear => ((total - step) / rest).max(0.0),
            Kind::Cosine => wave(progress).max(0.0),
            Kind::CosineWithRestarts if progress >= 1.0 => 0.0,
            Kind::CosineWithRestarts => {
                (0.5 * (1.0 + (PI * ((a.num_cycles * progress) % 1.0)).cos())).max(0.0)
            }
            Kind::CosineWithMinLr => above(self.min_rate(), wave(progress)),
            Kind::CosineWarmupWithMinLr => {
                above(self.min_rate(), wave((step - warmup + 1.0) / rest))
            }
            Kind::Polynomial if step > total => a.lr_end / self.peak,
            Kind::Polynomial => {
                let left = 1.0 - (step - warmup) / (total - warmup);
                ((self.peak - a.lr_end) * left.powf(a.power) + a.lr_end) / self.peak
            }
            Kind::InverseSqrt => {
                let default = if warmup > 0.0 { warmup } else { 10_000.0 };
                let scale = a.timescale.unwrap_or(default);
                1.0 / ((step + (scale - warmup)) / scale).sqrt()
            }
            Kind::Constant | Kind::ConstantWithWarmup | Kind::WarmupStableDecay => 1.0,
        }
    }

    /// The lowest rate of a cosine schedule as a fraction of the peak.
    fn min_rate(&self) -> f64 {
        match self.arguments.min_lr {
            Some(min) if min > 0.0 => min / self.peak,
            Some(_) => 0.0,
            None => self.arguments.min_lr_rate,
        }
    }

    fn stable_then_decay(&self, step: f64) -> f64 {
        let (a, warmup) = (&self.arguments, self.warmup);
        let decay = a.num_decay_steps as f64;
        let stable = a.num_stable_steps.map_or(self.total - warmup - decay, |n| n as f64);
        if step < warmup {
            let progress = step / warmup.max(1.0);
            let rise = match a.warmup_type {
                RampShape::Linear => progress,
                RampShape::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
                RampShape::OneMinusSqrt => 1.0 - (1.0 - progress).sqrt(),
            };
            return above(a.min_lr_ratio, rise);
        }
        if step < warmup + stable {
            return 1.0;
        }
        if step >= warmup + stable + decay {
            return a.min_lr_ratio;
        }
        let progress = (step - warmup - stable) / decay.max(1.0);
        let fall = match a.decay_type {
            RampShape::Linear => 1.0 - progress,
            RampShape::Cosine => 0.5 * (1.0 + (PI * a.num_cycles * 2.0 * progress).cos()),
            RampShape::OneMinusSqrt => 1.0 - progress.sqrt(),
        };
        above(a.min_lr_ratio, fall)
    }
}

/// Maps a factor between 0 and 1 to one between `min` and 1.
fn above(min: f64, factor: f64) -> f64 {
    (factor * (1.0 - min) + min).max(0.0)
}
