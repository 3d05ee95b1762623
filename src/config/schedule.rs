//! Learning-rate schedules under transformers' names, and the arguments that each takes. Layer 1.
//!
//! Invariant: names, arguments and defaults are those of transformers 5.17; an argument that the
//! chosen schedule does not take is an error.

use serde_json::{Map, Value as Json};
use toml::Value as Toml;

use super::value::{Given, Value, choose, word};

/// The learning-rate schedule: `lr_scheduler_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LearningRateSchedule {
    /// Falls to 0 at the end.
    Linear,
    /// Half a cosine wave (or `num_cycles` waves) down to 0.
    Cosine,
    /// `num_cycles` times half a cosine wave, each starting from the peak.
    CosineWithRestarts,
    /// Like cosine, down to `min_lr` or `min_lr_rate`.
    CosineWithMinLr,
    /// Like cosine_with_min_lr, with a warmup that starts above 0.
    CosineWarmupWithMinLr,
    /// A power of the remaining share, down to `lr_end`.
    Polynomial,
    /// Falls with the inverse square root of the step.
    InverseSqrt,
    /// Constant until the last `num_decay_steps`.
    WarmupStableDecay,
    /// The peak throughout, without warmup.
    Constant,
    /// The peak after the warmup.
    ConstantWithWarmup,
}

const NAMES: [(&[&str], LearningRateSchedule); 10] = [
    (&["linear"], LearningRateSchedule::Linear),
    (&["cosine"], LearningRateSchedule::Cosine),
    (&["cosine_with_restarts"], LearningRateSchedule::CosineWithRestarts),
    (&["cosine_with_min_lr"], LearningRateSchedule::CosineWithMinLr),
    (&["cosine_warmup_with_min_lr"], LearningRateSchedule::CosineWarmupWithMinLr),
    (&["polynomial"], LearningRateSchedule::Polynomial),
    (&["inverse_sqrt"], LearningRateSchedule::InverseSqrt),
    (&["warmup_stable_decay"], LearningRateSchedule::WarmupStableDecay),
    (&["constant"], LearningRateSchedule::Constant),
    (&["constant_with_warmup"], LearningRateSchedule::ConstantWithWarmup),
];

impl LearningRateSchedule {
    /// The word in a run file.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, s)| *s == self).map_or("", |(names, _)| names[0])
    }

    /// The arguments that it takes.
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Linear | Self::Constant | Self::ConstantWithWarmup => &[],
            Self::Cosine | Self::CosineWithRestarts => &["num_cycles"],
            Self::CosineWithMinLr => &["num_cycles", "min_lr", "min_lr_rate"],
            Self::CosineWarmupWithMinLr => {
                &["num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"]
            }
            Self::Polynomial => &["lr_end", "power"],
            Self::InverseSqrt => &["timescale"],
            Self::WarmupStableDecay => &[
                "num_decay_steps",
                "num_stable_steps",
                "warmup_type",
                "decay_type",
                "min_lr_ratio",
                "num_cycles",
            ],
        }
    }
}

impl Value for LearningRateSchedule {
    fn kind() -> String {
        NAMES.map(|(names, _)| names[0]).join(" | ")
    }

    fn read(given: &Given) -> Result<Self, String> {
        let shown = given.shown();
        let name = shown.trim_matches('"');
        if ["reduce_lr_on_plateau", "greedy"].contains(&name) {
            return Err(format!(
                "a schedule that depends on the step number alone ({name} depends on the \
                 evaluations); use one of {}, and load_best_model_at_end or \
                 early_stopping_patience to act on evaluations",
                Self::kind().replace(" |", ",")
            ));
        }
        choose(given, &NAMES)
    }

    fn written(&self) -> Toml {
        word(self.name())
    }
}

/// The shape of a warmup or a decay of warmup_stable_decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RampShape {
    /// `linear`
    Linear,
    /// `cosine`
    Cosine,
    /// `1-sqrt`
    OneMinusSqrt,
}

/// The values of `lr_scheduler_kwargs`, with defaults for the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduleArguments {
    /// Number of waves or restarts.
    pub num_cycles: f64,
    /// The lowest rate of a cosine with a minimum: the rate itself.
    pub min_lr: Option<f64>,
    /// The same as a share of the peak.
    pub min_lr_rate: f64,
    /// Start of a warmup that does not start at 0, as a share of the peak.
    pub warmup_lr_rate: Option<f64>,
    /// The last rate of a polynomial schedule.
    pub lr_end: f64,
    /// The power of a polynomial schedule.
    pub power: f64,
    /// Time scale of inverse_sqrt; None: the warmup's steps, or 10,000.
    pub timescale: Option<f64>,
    /// Steps of the decay of warmup_stable_decay.
    pub num_decay_steps: u64,
    /// Steps at the peak; None: all but warmup and decay.
    pub num_stable_steps: Option<u64>,
    /// Shape of the warmup.
    pub warmup_type: RampShape,
    /// Shape of the decay.
    pub decay_type: RampShape,
    /// Start of the warmup and end of the decay, as a share of the peak.
    pub min_lr_ratio: f64,
}

impl ScheduleArguments {
    /// Reads `lr_scheduler_kwargs` for a schedule. The error says what is wrong with it.
    pub fn read(
        schedule: LearningRateSchedule,
        given: &Map<String, Json>,
    ) -> Result<ScheduleArguments, String> {
        let (name, takes) = (schedule.name(), schedule.arguments());
        if let Some(key) = given.keys().find(|key| !takes.contains(&key.as_str())) {
            let hint = match (key.as_str(), takes.is_empty()) {
                ("num_warmup_steps", _) => "give warmup_steps".to_string(),
                (_, true) => format!("{name} takes no arguments"),
                _ => format!("{name} takes {}", takes.join(", ")),
            };
            return Err(format!("lr_scheduler_kwargs: {key} is not an argument of {name}; {hint}"));
        }
        let of = Arguments { name, given };
        let restarts = schedule == LearningRateSchedule::CosineWithRestarts;
        let min = (of.number("min_lr")?, of.number("min_lr_rate")?);
        let needs_min = takes.contains(&"min_lr");
        match min {
            (Some(_), Some(_)) => {
                return Err(
                    "lr_scheduler_kwargs: min_lr and min_lr_rate cannot be combined: give only one"
                        .into(),
                );
            }
            (None, None) if needs_min => {
                return Err(format!(
                    "lr_scheduler_kwargs: {name} needs min_lr or min_lr_rate, such as '{{\"min_lr_rate\": 0.1}}'"
                ));
            }
            _ => {}
        }
        let decay = of.count("num_decay_steps")?;
        if schedule == LearningRateSchedule::WarmupStableDecay && decay.is_none() {
            return Err(format!(
                "lr_scheduler_kwargs: {name} needs num_decay_steps, such as '{{\"num_decay_steps\": 100}}'"
            ));
        }
        let timescale = of.number("timescale")?;
        if timescale == Some(0.0) {
            return Err("lr_scheduler_kwargs: timescale = 0: must be above 0".into());
        }
        Ok(ScheduleArguments {
            num_cycles: of.number("num_cycles")?.unwrap_or(if restarts { 1.0 } else { 0.5 }),
            min_lr: min.0,
            min_lr_rate: min.1.unwrap_or(0.0),
            warmup_lr_rate: of.number("warmup_lr_rate")?,
            lr_end: of.number("lr_end")?.unwrap_or(1e-7),
            power: of.number("power")?.unwrap_or(1.0),
            timescale,
            num_decay_steps: decay.unwrap_or(0),
            num_stable_steps: of.count("num_stable_steps")?,
            warmup_type: of.shape("warmup_type")?.unwrap_or(RampShape::Linear),
            decay_type: of.shape("decay_type")?.unwrap_or(RampShape::Cosine),
            min_lr_ratio: of.number("min_lr_ratio")?.unwrap_or(0.0),
        })
    }

    /// A problem if an argument exceeds the peak rate of the run.
    pub fn beyond(&self, schedule: LearningRateSchedule, peak: f64) -> Option<String> {
        let (name, rate) = match schedule {
            LearningRateSchedule::Polynomial if self.lr_end >= peak => ("lr_end", self.lr_end),
            _ => ("min_lr", self.min_lr.filter(|min| *min > peak)?),
        };
        Some(format!(
            "lr_scheduler_kwargs: {name} = {rate:e}: must be below learning_rate, {peak:e}"
        ))
    }
}

/// The given arguments.
struct Arguments<'a> {
    name: &'static str,
    given: &'a Map<String, Json>,
}

impl Arguments<'_> {
    /// null is transformers' None, the default.
    fn get(&self, key: &str) -> Option<&Json> {
        self.given.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, value: &Json, expected: &str) -> String {
        format!("lr_scheduler_kwargs: {key} = {value} of {}: expected {expected}", self.name)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|v| (0.0..=1e9).contains(v));
        let expected = "a number from 0 to 1e9";
        number.map(Some).ok_or_else(|| self.wrong(key, value, expected))
    }

    fn count(&self, key: &str) -> Result<Option<u64>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = value.as_u64().filter(|v| *v <= 1_000_000_000_000);
        count.map(Some).ok_or_else(|| self.wrong(key, value, "a whole number, not negative"))
    }

    fn shape(&self, key: &str) -> Result<Option<RampShape>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        Ok(Some(match value.as_str() {
            Some("linear") => RampShape::Linear,
            Some("cosine") => RampShape::Cosine,
            Some("1-sqrt") => RampShape::OneMinusSqrt,
            _ => return Err(self.wrong(key, value, "one of linear, cosine, 1-sqrt")),
        }))
    }
}
