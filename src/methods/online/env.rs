//! The environment of an online method: prompts, the sampler, the scorer and the reference. Layer
//! 7.
//!
//! Invariant: nothing here depends on the loss.

use std::time::Instant;

use serde_json::{Map, Value, json};

use super::buffer::RolloutSchedule;
use super::chunks::{ChunkRow, chunks, token_budget};
use super::episodes::Episodes;
use super::metrics;
use super::prompts::Prompts;
use super::rollout::{Rollout, split};
use super::sampler::{SampleRequest, Sampler};
use super::scorer::Scorer;
use crate::autograd::Cx;
use crate::config::{
    EnvironmentOptions, MatmulChoice, ReferenceOptions, ReferenceSyncOptions, RewardOptions,
    SamplingOptions, TrainingConfig,
};
use crate::data::masked::MaskedSequence;
use crate::data::sft::SftExample;
use crate::error::{Error, Result};
use crate::methods::offline::rows::Split;
use crate::methods::reference::{Reference, ReferenceSetup};
use crate::methods::{MethodInputs, Metric};
use crate::model::batch::{Batch, Group, Sequence};
use crate::model::decoder::Decoder;
use crate::observer::number;
use crate::observer::output::excerpt;
use crate::ops::head::head_logps;
use crate::rewards::Scores;

/// The options of a method's environment.
#[derive(Clone, Default)]
pub struct EnvOptions {
    pub rewards: RewardOptions,
    pub sampling: SamplingOptions,
    pub sync: ReferenceSyncOptions,
    pub max_completion_length: usize,
    pub max_sequences: Option<usize>,
    pub environment: EnvironmentOptions,
    /// Completions per generation.
    pub generation: usize,
}

pub struct RolloutEnv {
    pub prompts: Prompts,
    pub sampler: Sampler,
    pub scorer: Scorer,
    pub reference: Reference,
    generation: usize,
    sync: ReferenceSyncOptions,
    log_completions: bool,
    /// With `log_completions`: the best and the worst completion of the last generation, until they
    /// are shown.
    pub shown: Vec<String>,
    /// Lines for completions.jsonl.
    pub log: Vec<Value>,
    seconds: Seconds,
}

/// Time spent since it was last read.
#[derive(Default)]
struct Seconds {
    generate: f64,
    score: f64,
    reference: f64,
}

impl RolloutEnv {
    pub fn new(
        options: &EnvOptions,
        training: &TrainingConfig,
        inputs: &MethodInputs,
    ) -> Result<RolloutEnv> {
        let length = options.max_completion_length;
        let mut sampler =
            Sampler::new(&options.sampling, length, options.max_sequences, training.seed, inputs)?;
        sampler.episodes = Episodes::new(&options.environment, length, training.seed, inputs)?;
        let mut scorer = Scorer::new(&options.rewards, options.environment.is_set(), inputs)?;
        let prompts = Prompts::new(training, inputs)?;
        scorer.set_columns(&prompts)?;
        Ok(RolloutEnv {
            prompts,
            sampler,
            scorer,
            reference: Reference::default(),
            generation: options.generation,
            sync: options.sync.clone(),
            log_completions: options.rewards.log_completions,
            shown: Vec::new(),
            log: Vec::new(),
            seconds: Seconds::default(),
        })
    }

    /// Tokens of the longest prompt with its completion.
    pub fn longest(&self) -> usize {
        self.prompts.longest() + self.sampler.max_completion_length
    }

    /// The most completions generated at once, if the memory plan chooses how many.
    pub fn planned_sequences(&self) -> Option<usize> {
        self.sampler.is_planned().then_some(self.generation)
    }

    /// Sets up what needs the initial policy: the sampler's cache, the reference (if needed), the
    /// reward model.
    pub fn attach(&mut self, cx: &mut Cx, model: &Decoder, reference: bool) -> Result<()> {
        if self.prompts.bad.count > 0 {
            cx.observer.note(&self.prompts.bad.to_string());
        }
        if let Some(note) = self.prompts.unused_template {
            cx.observer.note(note);
        }
        let dropout = model.adapter.as_ref().map_or(0.0, |a| a.dropout());
        if dropout > 0.0 {
            return Err(Error::Config(format!(
                "lora_dropout = {dropout}: online RL does not support dropout, because the \
                 trainer's log-probs would differ from the sampler's; set lora_dropout=0"
            )));
        }
        if cx.device.capabilities().gemm_depends_on_rows && cx.matmul == MatmulChoice::Auto {
            // For another number of rows the library may choose another kernel, with other bits.
            let why = "so that the sampler's log-probs are the trainer's bit for bit";
            cx.observer.note(&format!("matmul=exact, {why}"));
            cx.matmul = MatmulChoice::Exact;
        }
        let longest = self.longest();
        self.sampler.attach(cx, model, longest)?;
        if reference {
            let options = ReferenceOptions { sync: self.sync.clone(), ..Default::default() };
            let setup = ReferenceSetup { options, longest, ..Default::default() };
            // Nothing can be precomputed: the completions do not exist yet.
            let none = |cx: &mut Cx, _: &Decoder, _| cx.float("no log-probs", &[0]);
            self.reference = Reference::new(setup).attached(cx, model, 0, || Ok(0), none)?;
        }
        self.scorer.attach(cx)?;
        if let Some(episodes) = &mut self.sampler.episodes {
            episodes.govern(&cx.stop, self.scorer.reward_env());
        }
        Ok(())
    }

    /// Generates completions of prompts of `split`; those of one prompt are adjacent.
    pub fn generate(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        split: Split,
        prompts: &[usize],
        request: SampleRequest,
    ) -> Result<Vec<Rollout>> {
        let begin = Instant::now();
        let longest;
        let prompts = match cx.device.computes() {
            true => prompts,
            // The memory plan assumes the longest prompts.
            false => {
                longest = self.prompts.longest_of(split, prompts.len());
                &longest
            }
        };
        let of = self.prompts.of(split);
        if cx.device.computes() {
            self.scorer.expect(of, prompts, request.n);
        }
        let scorer = &mut self.scorer;
        let done = &mut |i: usize, rollout: &Rollout| scorer.hear(i, rollout);
        let rollouts = self.sampler.sample(cx, model, of, prompts, request, done);
        self.seconds.generate += begin.elapsed().as_secs_f64();
        rollouts
    }

    /// Every reward of every rollout. A reward's errors name the row.
    pub fn score(&mut self, cx: &mut Cx, split: Split, rollouts: &[Rollout]) -> Result<Scores> {
        let begin = Instant::now();
        let scores = self.scorer.score(cx, self.prompts.of(split), rollouts);
        self.seconds.score += begin.elapsed().as_secs_f64();
        scores
    }

    /// Log-probs of training completions under the reference at the sampling temperature, in chunks
    /// of `budget` tokens, without a tape. None if there is no reference model.
    pub fn reference_logps(
        &mut self,
        cx: &mut Cx,
        rollouts: &[Rollout],
        budget: usize,
    ) -> Result<Option<Vec<Vec<f32>>>> {
        let Some(reference) = self.reference.model() else { return Ok(None) };
        let begin = Instant::now();
        let all = self.in_chunks(reference, rollouts, budget, |some| {
            let batch = self.batch(cx, reference, some)?;
            let hidden = reference.target_hidden(cx, &batch)?;
            head_logps(cx, &hidden, &reference.head, &batch.targets, self.scale())?.logp.to_f32()
        })?;
        self.seconds.reference += begin.elapsed().as_secs_f64();
        Ok(Some(all))
    }

    /// One value per token of training completions, computed in chunks of `budget` tokens.
    pub fn in_chunks(
        &self,
        model: &Decoder,
        rollouts: &[Rollout],
        budget: usize,
        mut values: impl FnMut(&[&Rollout]) -> Result<Vec<f32>>,
    ) -> Result<Vec<Vec<f32>>> {
        let mut all = vec![Vec::new(); rollouts.len()];
        for chunk in self.chunks(model, rollouts.iter(), budget) {
            let some: Vec<&Rollout> = chunk.iter().map(|i| &rollouts[*i]).collect();
            let each = split(&values(&some)?, some.iter().map(|r| r.ids.len()));
            for (i, values) in chunk.into_iter().zip(each) {
                all[i] = values;
            }
        }
        Ok(all)
    }

    /// Which training completions are computed together: see [`mod@super::chunks`].
    pub fn chunks<'a>(
        &self,
        model: &Decoder,
        rollouts: impl Iterator<Item = &'a Rollout>,
        budget: usize,
    ) -> Vec<Vec<usize>> {
        let virtuals = model.vocab().virtuals;
        let row = |r: &Rollout| ChunkRow {
            prompt: r.prompt,
            prompt_tokens: self.prompts.train[r.prompt].ids.len() + virtuals,
            tokens: r.whole().len(),
        };
        chunks(&rollouts.map(row).collect::<Vec<_>>(), budget)
    }

    /// The tokens of a chunk: see [`token_budget`].
    pub fn budget(&self, model: &Decoder, schedule: &RolloutSchedule, whole_groups: bool) -> usize {
        let prompt = self.prompts.longest() + model.vocab().virtuals;
        token_budget(schedule, prompt, self.sampler.max_completion_length, whole_groups)
    }

    /// A packed batch of training completions. Adjacent completions of one prompt share its rows.
    pub fn batch(&self, cx: &Cx, model: &Decoder, rollouts: &[&Rollout]) -> Result<Batch> {
        let mut groups: Vec<Group> = Vec::new();
        let mut last = None;
        for r in rollouts {
            let completion = Sequence { ids: r.whole(), target: r.targets() };
            match groups.last_mut() {
                Some(group) if last == Some(r.prompt) => group.completions.push(completion),
                _ => groups.push(Group {
                    prompt: &self.prompts.train[r.prompt].ids,
                    completions: vec![completion],
                }),
            }
            last = Some(r.prompt);
        }
        Batch::grouped(cx, &groups, model.vocab())
    }

    /// Rows to train on: the prompt of `split`, then the completion, whose sampled tokens are the
    /// targets.
    pub fn examples(&self, split: Split, rollouts: Vec<Rollout>) -> Vec<SftExample> {
        let one = |r: Rollout| {
            let prompt = &self.prompts.of(split)[r.prompt].ids;
            let MaskedSequence { input_ids, mut target_mask } =
                MaskedSequence::new(prompt, r.whole());
            if let Some(targets) = r.targets() {
                target_mask[prompt.len()..].copy_from_slice(targets);
            }
            SftExample { input_ids, target_mask, row: r.prompt }
        };
        rollouts.into_iter().map(one).collect()
    }

    /// The factor of the logits, 1 / temperature, the same as the sampler's.
    pub fn scale(&self) -> f32 {
        1.0 / self.sampler.options.temperature as f32
    }

    /// Records lines for completions.jsonl and, with `log_completions`, the best and the worst to
    /// show.
    pub fn record(&mut self, rollouts: &[Rollout], scores: &Scores, advantages: &[f64]) {
        let total = scores.total();
        for (i, r) in rollouts.iter().enumerate() {
            let names = scores.names.iter().zip(&scores.each);
            let each: Map<String, Value> = names.map(|(n, e)| (n.clone(), json!(e[i]))).collect();
            let said = r.conversation.as_ref().map_or_else(|| json!(r.text), |c| c.said.clone());
            self.log.push(json!({
                "prompt": self.prompts.train[r.prompt].value, "completion": said,
                "reward": total[i], "rewards": each, "advantage": advantages.get(i),
                "finished": r.finished,
            }));
        }
        if !self.log_completions {
            return;
        }
        let known = |i: &usize| total[*i].is_some_and(f64::is_finite);
        let value = |i: &usize| total[*i].unwrap_or(0.0);
        let rows = || (0..rollouts.len()).filter(known);
        let best = rows().max_by(|a, b| value(a).total_cmp(&value(b)));
        let worst = rows().min_by(|a, b| value(a).total_cmp(&value(b)));
        let show = |(word, i): (&str, Option<usize>)| {
            let i = i?;
            let text = excerpt(&rollouts[i].text);
            Some(format!("  {word} completion, reward {}: {text}", number::decimal(value(&i))))
        };
        self.shown = [("best", best), ("worst", worst)].into_iter().filter_map(show).collect();
    }

    /// Records lines for completions.jsonl for completions without a score; `by` names their
    /// author.
    pub fn record_written(&mut self, by: &str, rollouts: &[Rollout]) {
        for r in rollouts {
            let prompt = &self.prompts.train[r.prompt].value;
            self.log.push(json!({
                "prompt": prompt, "completion": r.text, "by": by, "finished": r.finished,
            }));
        }
    }

    /// How the `total` seconds of a step were spent.
    pub fn take_seconds(&mut self, total: f64) -> Vec<Metric> {
        let Seconds { generate, score, reference } = std::mem::take(&mut self.seconds);
        let mut split: Vec<Metric> =
            vec![("time/generate".into(), generate), ("time/score".into(), score)];
        if self.reference.model().is_some() {
            split.push(("time/reference".into(), reference));
        }
        split.push(("time/train".into(), (total - generate - score - reference).max(0.0)));
        split
    }

    /// One sampled completion for each evaluation prompt; their time does not count as a step's.
    pub fn eval_rollouts(&mut self, cx: &mut Cx, model: &Decoder) -> Result<Vec<Rollout>> {
        let prompts = self.prompts.all_eval();
        let request = SampleRequest::new(1, u64::MAX - 1);
        let rollouts = self.generate(cx, model, Split::Eval, &prompts, request);
        self.seconds = Seconds::default();
        rollouts
    }

    /// Mean rewards over the evaluation prompts, one completion each.
    pub fn evaluate(&mut self, cx: &mut Cx, model: &Decoder) -> Result<Vec<Metric>> {
        let rollouts = self.eval_rollouts(cx, model)?;
        let scores = self.score(cx, Split::Eval, &rollouts)?;
        self.seconds = Seconds::default();
        Ok(metrics::of_generation(&rollouts, &scores))
    }
}
