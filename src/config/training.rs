//! The options that every training run has: TRL's over HF's `TrainingArguments`. Layer 1.
//!
//! Invariant: names and defaults that change the numbers are those of trl 1.16.0 over transformers
//! 5.17; an option of ours says so in its doc.

#![deny(missing_docs)]

use super::sources::{DataFiles, MixtureStop};
use super::value::{Amount, words};
use super::{
    BestModelOptions, DataOptions, JsonObject, LearningRateSchedule, MuonOptions, PathText, Report,
    SampleOptions, ScheduleArguments, TemplateOptions, section,
};

words! {
    /// When an action happens during a run.
    pub enum When {
        No = "no",
        Steps = "steps",
        Epoch = "epoch",
    }
}

words! {
    /// `adamw_torch_fused` and `adamw_torch` are HF's names for the same arithmetic.
    pub enum Optim {
        /// Float master weights and moments.
        Adamw = "adamw" | "adamw_torch_fused" | "adamw_torch",
        /// No master weights: bfloat16 weights, stochastically rounded.
        AdamwBf16 = "adamw_bf16",
        /// bfloat16 moments, stochastically rounded; bfloat16 weights as in adamw_bf16.
        AdamwBf16Moments = "adamw_bf16_moments",
        /// Float master weights; moments in 8-bit codes, with one scale per 256.
        Adamw8bit = "adamw_8bit" | "adamw_bnb_8bit",
        /// Orthogonalised updates for the matrices of the layers, AdamW for the rest.
        Muon = "muon",
    }
}

words! {
    /// Number type of the forward and backward pass.
    pub enum Dtype {
        Auto = "auto",
        Float32 = "float32" | "fp32" | "f32",
        Bfloat16 = "bfloat16" | "bf16",
    }
}

words! {
    /// The device of a run.
    pub enum DeviceChoice {
        Auto = "auto",
        Cuda = "cuda",
        Cpu = "cpu",
    }
}

words! {
    /// Recomputing activations in the backward pass.
    pub enum GradientCheckpointing {
        Auto = "auto",
        Light = "light",
        On = "true",
        Off = "false",
    }
}

words! {
    /// The order of the training rows.
    pub enum SamplingStrategy {
        Random = "random",
        Sequential = "sequential",
    }
}

words! {
    /// The choice of matrix products.
    pub enum MatmulChoice {
        Auto = "auto",
        Library = "library",
        Exact = "exact",
        Own = "own",
    }
}

words! {
    /// The choice of attention kernels.
    pub enum AttentionChoice {
        Auto = "auto",
        Simt = "simt" | "light",
        TensorCore = "tensor_core",
        Wgmma = "wgmma",
    }
}

words! {
    /// The version whose defaults a run file assumes.
    pub enum Compat {
        Trl1_16 = "trl-1.16.0",
    }
}

section! {
    /// Keys common to all methods.
    pub struct TrainingConfig = "training" {
        /// Peak learning rate. Each method has its own default (SFT: 2e-5).
        pub learning_rate: f64 = 5e-5,
        /// Rows in a micro-batch. An optimizer step has gradient_accumulation_steps micro-batches;
        /// losses are normalised over all of its rows.
        pub per_device_train_batch_size: usize = 8,
        /// Rows in an evaluation batch.
        pub per_device_eval_batch_size: usize = 8,
        /// Micro-batches in an optimizer step.
        pub gradient_accumulation_steps: usize = 1,
        /// Passes over the data; may be fractional. max_steps overrides it.
        pub num_train_epochs: f64 = 3.0,
        /// Optimizer steps of the run. -1: as many as num_train_epochs needs.
        pub max_steps: i64 = -1,
        /// Shape of the learning rate after the warmup.
        pub lr_scheduler_type: LearningRateSchedule = LearningRateSchedule::Linear,
        /// Arguments of the schedule, a JSON object such as {"min_lr_rate": 0.1}; docs/optimizers.md
        /// lists them. none: their defaults.
        pub lr_scheduler_kwargs: Option<JsonObject> = None,
        /// Steps of linear warmup from 0. Below 1: a share of the run's steps, rounded up.
        pub warmup_steps: Amount = Amount::Count(0),
        /// Decoupled weight decay. Biases and norm weights are not decayed.
        pub weight_decay: f64 = 0.0,
        /// Decay rate of AdamW's first moment.
        pub adam_beta1: f64 = 0.9,
        /// Decay rate of AdamW's second moment.
        pub adam_beta2: f64 = 0.999,
        /// Added to the square root of the second moment.
        pub adam_epsilon: f64 = 1e-8,
        /// Clip the gradient to this global L2 norm. 0: no clipping.
        pub max_grad_norm: f64 = 1.0,
        /// adamw: float master weights and moments. adamw_bf16: bfloat16 weights with stochastic
        /// rounding. adamw_8bit: moments in 8 bits. adamw_bf16_moments: moments in bfloat16, and
        /// bfloat16 weights as with adamw_bf16. muon: orthogonalised updates for the matrices of
        /// the layers, adamw for the rest.
        pub optim: Optim = Optim::Adamw,
        /// Seed for data order, dropout, sampling and new weights.
        pub seed: u64 = 42,
        /// Order of rows. random: a new permutation every epoch. sequential: the file's order.
        pub train_sampling_strategy: SamplingStrategy = SamplingStrategy::Random,
        /// Steps between two log lines. Below 1: a share of the run's steps.
        pub logging_steps: Amount = Amount::Count(10),
        /// Where metrics go besides metrics.jsonl. tensorboard: an event file in OUTPUT/runs. Other
        /// services have no effect.
        pub report_to: Vec<String> = vec!["none".into()],
        /// When to write a checkpoint. The final model is always written.
        pub save_strategy: When = When::Steps,
        /// Steps between two checkpoints. Below 1: a share of the run's steps.
        pub save_steps: Amount = Amount::Count(500),
        /// Checkpoints to keep. Older ones are deleted once a newer one is on disk. none: keep all.
        pub save_total_limit: Option<usize> = None,
        /// When to evaluate on the evaluation rows.
        pub eval_strategy: When = When::No,
        /// Steps between two evaluations. Below 1: a share of the run's steps. none: logging_steps.
        pub eval_steps: Option<Amount> = None,
        /// Ours. Rows to split off for evaluation if there is no --eval-data. Below 1: a share of
        /// the rows.
        pub eval_rows: Amount = Amount::Count(0),
        /// Recompute activations in the backward pass. It changes memory and speed, but no bit of
        /// the result. true: whole layers. light: only the outputs of norms and activations, for a
        /// few per cent of the time. auto: the first of false, light and true that fits (TRL:
        /// true).
        pub gradient_checkpointing: GradientCheckpointing = GradientCheckpointing::Auto,
        /// Ours. Number type of the forward and backward pass. auto: bfloat16 on a GPU, float32 on
        /// a CPU.
        pub dtype: Dtype = Dtype::Auto,
        /// Ours. Where to run. auto: the GPU if there is one.
        pub device: DeviceChoice = DeviceChoice::Auto,
        /// Ours. Which matrix products to use on a GPU. library: the fastest of cuBLASLt, whose
        /// bits may depend on the number of rows. exact: in the forward pass, the fastest of those
        /// found to have the bits of the engine's own kernel. own: the engine's own kernels. auto:
        /// exact for online methods and for decoding steps of up to 64 rows (on Hopper, for small
        /// products of up to 1,024 rows), otherwise library (except products that include an
        /// activation or an adapter, which only the engine's own kernels do).
        pub matmul: MatmulChoice = MatmulChoice::Auto,
        /// Ours. Which attention kernels to use. auto: wgmma for bfloat16 on a Hopper GPU,
        /// tensor_core for bfloat16 on other GPUs, otherwise simt. wgmma, whose
        /// forward has the bits of tensor_core, exists for head sizes 64 and 128; others run as
        /// tensor_core.
        pub attention: AttentionChoice = AttentionChoice::Auto,
        /// Ours where TRL has no such option. A Jinja file, or a folder with a tokenizer, whose
        /// chat template replaces the model's.
        pub chat_template_path: Option<PathText> = None,
        /// Ours. Disable the model's dropout (in TRL an option of some trainers). Each method has
        /// the default of its TRL trainer.
        pub disable_dropout: bool = false,
        /// Ours. Resume although options or inputs (rows, template, tokenizer, models) have changed
        /// since the checkpoint; the changes are printed as warnings.
        pub resume_with_changes: bool = false,
        /// Ours. The version whose defaults this run file assumes; written into every resolved run
        /// file.
        pub compat: Compat = Compat::Trl1_16,
        /// Ours. Files of rows, folders or patterns, if no --data is given; with weights a mixture:
        /// `a.jsonl:0.7,b.parquet:0.3`.
        pub data: DataFiles = DataFiles::default(),
        /// Ours. When a mixture ends. first_exhausted: when the first file is used up.
        /// all_exhausted: when every file has been used up; files that end earlier begin again.
        pub stopping_strategy: MixtureStop = MixtureStop::FirstExhausted,
        /// Ours. Where to keep tokenised rows for the next start. auto: TEMPER_CACHE, else temper in
        /// XDG_CACHE_HOME or ~/.cache, for files of 8 MiB or more. off: nowhere. Otherwise a folder.
        pub data_cache: PathText = PathText("auto".into()),
        ..pub best: BestModelOptions = BestModelOptions::default(),
        ..pub samples: SampleOptions = SampleOptions::default(),
        ..pub muon: MuonOptions = MuonOptions::default(),
        ..pub template: TemplateOptions = TemplateOptions::default(),
        ..pub reading: DataOptions = DataOptions::default(),
    }
}

impl TrainingConfig {
    /// Steps of the run: max_steps, or as many as the epochs have.
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        match u64::try_from(self.max_steps) {
            Ok(steps) if steps > 0 => steps,
            _ => (self.num_train_epochs * steps_per_epoch as f64).ceil() as u64,
        }
    }

    /// The arguments of the schedule. The error says what is wrong with them.
    pub fn schedule_arguments(&self) -> Result<ScheduleArguments, String> {
        let given = self.lr_scheduler_kwargs.clone().unwrap_or_default();
        ScheduleArguments::read(self.lr_scheduler_type, &given.0)
    }

    fn rules(&self, report: &mut Report) {
        if let Some(problem) = self.data.problem() {
            report.problem(problem);
        }
        for to in &self.report_to {
            if !["none", "all", "tensorboard"].contains(&to.as_str()) {
                report.note(format!(
                    "report_to = {to} has no effect: temper writes metrics.jsonl, and event files for tensorboard"
                ));
            }
        }
        report.at_least("per_device_train_batch_size", self.per_device_train_batch_size, 1);
        report.at_least("per_device_eval_batch_size", self.per_device_eval_batch_size, 1);
        report.at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1);
        for (key, value) in [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("adam_epsilon", self.adam_epsilon),
            ("max_grad_norm", self.max_grad_norm),
        ] {
            report.must(value >= 0.0, || format!("{key} = {value}: must not be negative"));
        }
        for (key, value) in [("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)] {
            report.must((0.0..1.0).contains(&value), || {
                format!("{key} = {value}: must be at least 0 and below 1")
            });
        }
        let epochs = self.num_train_epochs;
        report.must(epochs > 0.0, || format!("num_train_epochs = {epochs}: must be above 0"));
        let steps = self.max_steps;
        report.must(steps == -1 || steps > 0, || {
            format!("max_steps = {steps}: must be above 0, or -1 to use num_train_epochs")
        });
        if steps > 0 && report.was_given("num_train_epochs") {
            report.note(format!("num_train_epochs has no effect: max_steps = {steps}"));
        }
        report
            .must(!self.logging_steps.is_zero(), || "logging_steps = 0: must be at least 1".into());
        report.must(!self.save_steps.is_zero(), || {
            "save_steps = 0: must be at least 1; save_strategy = \"no\" writes no checkpoints"
                .into()
        });
        report.must(self.save_total_limit != Some(0), || {
            "save_total_limit = 0: must be at least 1; \"none\" keeps all checkpoints".into()
        });
        if self.save_strategy != When::Steps {
            report.idle("save_steps", "save_strategy", "save_strategy is not \"steps\"");
        }
        if self.save_strategy == When::No {
            report.idle("save_total_limit", "save_strategy", "save_strategy is \"no\"");
        }
        report.must(self.eval_steps.is_none_or(|s| !s.is_zero()), || {
            "eval_steps = 0: must be at least 1".into()
        });
        if self.eval_strategy != When::Steps {
            report.idle("eval_steps", "eval_strategy", "eval_strategy is not \"steps\"");
        }
        if self.eval_strategy == When::No && !self.eval_rows.is_zero() {
            report.idle("eval_rows", "eval_strategy", "eval_strategy is \"no\"");
        }
        if self.lr_scheduler_type == LearningRateSchedule::Constant && !self.warmup_steps.is_zero()
        {
            report.idle(
                "warmup_steps",
                "lr_scheduler_type",
                "lr_scheduler_type is \"constant\"; constant_with_warmup has one",
            );
        }
        match self.schedule_arguments() {
            Ok(arguments) => {
                if let Some(m) = arguments.beyond(self.lr_scheduler_type, self.learning_rate) {
                    report.problem(m);
                }
            }
            Err(message) => report.problem(message),
        }
        self.best.rules_of_run(self, report);
        if self.eval_strategy == When::No {
            report.idle("sample_prompts", "eval_strategy", "eval_strategy is \"no\"");
        }
        if self.optim != Optim::Muon {
            MuonOptions::idle(report);
        } else if self.learning_rate == 0.0 && self.muon.muon_learning_rate.is_some() {
            report
                .problem("muon_learning_rate is set, so learning_rate must be above 0 too".into());
        }
        if self.optim == Optim::AdamwBf16 && self.dtype == Dtype::Float32 {
            report.problem(
                "optim = \"adamw_bf16\" keeps its weights in bfloat16, but dtype is float32; set \
                 dtype=bfloat16 or optim=adamw"
                    .into(),
            );
        }
    }
}
