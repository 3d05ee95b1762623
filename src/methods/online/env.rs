//! What all online methods share: prompts, generation by the trainer's own forward, rewards, the
//! reference. Layer 7.
//!
//! A method's step is four lines: generate, score, advantages, update; the first two are here
//! ([`World::generate`], [`World::score`]), the third is the method's own, and the update of a
//! clipped policy loss is [`policy`].
//!
//! Invariant: which prompts a generation takes and what is drawn for them is a function of (data,
//! seed, generation) and of the policy's weights; the log-probs that the sampler gives are the
//! trainer's, bit for bit, so no old-policy forward runs.

use std::path::Path;
use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::autograd::Cx;
use crate::config::{MatmulChoice, OnlineConfig, Sampling as Order, TrainingConfig};
use crate::data::format::Content;
use crate::data::order::epoch_order;
use crate::data::render::{RenderedPrompt, Renderer};
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::methods::online::advantage::mean_std;
use crate::methods::reference::{Reference, ReferenceKeys};
use crate::methods::{Metric, Source};
use crate::model::batch::{Batch, Group, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::rewards::model::RewardModel;
use crate::rewards::{RewardBatch, Rewards, Scores};
use crate::rollout::sample::{Sampling, SamplingOptions};
use crate::rollout::stop::stop_ids;
use crate::rollout::{Engine, EngineOptions, Finish, Request};

/// Set numbers of the models beside the policy (0), its adapter (1) and the reference (2).
pub const VALUE: u32 = 3;
pub const REWARD: u32 = 4;

/// A row of the data.
pub struct Prompt {
    pub ids: Vec<u32>,
    /// As the row has it: a string, or messages.
    pub value: Value,
    /// All other columns.
    columns: Map<String, Value>,
    pub source: String,
}

/// One completion of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Index of the prompt.
    pub prompt: usize,
    pub ids: Vec<u32>,
    /// Log-probs of its tokens as they were drawn: at the sampling temperature, of the full
    /// distribution.
    pub logps: Vec<f32>,
    pub entropies: Vec<f32>,
    /// It ended by itself.
    pub finished: bool,
    pub text: String,
}

/// What an online method acts in.
pub struct World {
    pub keys: OnlineConfig,
    pub train: Vec<Prompt>,
    pub eval: Vec<Prompt>,
    pub tokenizer: Tokenizer,
    rewards: Rewards,
    pub reward_model: Option<RewardModel>,
    engine: Option<Engine>,
    pub reference: Reference,
    order: Order,
    seed: u64,
    stop: Vec<u32>,
    /// Lines for completions.jsonl.
    pub log: Vec<Value>,
    pub seconds: Seconds,
}

/// The time split of a step.
#[derive(Default)]
pub struct Seconds {
    pub generate: f64,
    pub score: f64,
    pub train: f64,
}

impl World {
    /// Reads prompts (`prompt`: string or messages; other columns go to the rewards) and rewards.
    pub fn new(keys: &OnlineConfig, training: &TrainingConfig, source: &Source) -> Result<World> {
        let tokenizer = Tokenizer::load(source.tokenizer.dir())?;
        let renderer = Renderer::new(source.tokenizer, source.template, source.model.vocab_size);
        let prompts = |rows: &[Row]| {
            rows.iter().map(|row| prompt(row, &renderer)).collect::<Result<Vec<_>>>()
        };
        let (train, eval) = (prompts(source.train)?, prompts(source.eval)?);
        let rewards = match keys.reward_funcs.len() {
            0 => Rewards { list: Vec::new() },
            n => Rewards::parse(
                &keys.reward_funcs,
                keys.reward_weights.as_ref().map(|w| &w[..n.min(w.len())]),
            )?,
        };
        let stop = stop_ids(source.tokenizer, source.model, &[])?;
        if stop.is_empty() {
            return Err(Error::Config(
                "the model's tokenizer, config.json and generation_config.json name no EOS token, so no completion would end; \
                 set eos_token_id in config.json"
                    .into(),
            ));
        }
        Ok(World {
            keys: keys.clone(),
            train,
            eval,
            tokenizer,
            rewards,
            reward_model: None,
            engine: None,
            reference: Reference::default(),
            order: training.train_sampling_strategy,
            seed: training.seed,
            stop,
            log: Vec::new(),
            seconds: Seconds::default(),
        })
    }

    /// Tokens of the longest prompt with its completion.
    pub fn longest(&self) -> usize {
        let prompt = self.train.iter().chain(&self.eval).map(|p| p.ids.len()).max().unwrap_or(1);
        prompt + self.keys.max_completion_length
    }

    /// Takes up the policy as it starts: the sampler's cache, the reference (`needed`), the reward
    /// model.
    pub fn attach(&mut self, cx: &mut Cx, model: &Decoder, needed: bool) -> Result<()> {
        let dropout = model.adapter.as_ref().map_or(0.0, |a| a.dropout());
        if dropout > 0.0 {
            return Err(Error::Config(format!(
                "lora_dropout = {dropout}: online RL runs without dropout, or the trainer's log-probs would not be the \
                 sampler's; set lora_dropout=0"
            )));
        }
        if cx.device.is_cuda() && cx.matmul == MatmulChoice::Auto {
            // The library may choose another kernel for another number of rows; the engine's own
            // does not.
            eprintln!(
                "note: matmul=own, so that the sampler's log-probs are the trainer's bit for bit"
            );
            cx.matmul = MatmulChoice::Own;
        }
        self.engine = Some(self.sampler(cx, model)?);
        if needed {
            let keys = &self.keys;
            let sync = keys
                .sync_ref_model
                .then_some((keys.ref_model_mixup_alpha, keys.ref_model_sync_steps as u64));
            self.reference = Reference::new(ReferenceKeys {
                sync,
                longest: self.longest(),
                ..Default::default()
            });
            // Nothing is computed beforehand: the completions are not there yet.
            self.reference.attach(cx, model, 0, |_, _| Ok(Vec::new()))?;
        }
        if let Some(dir) = &self.keys.reward_model {
            self.reward_model = Some(RewardModel::load(cx, REWARD, Path::new(dir))?);
        }
        Ok(())
    }

    /// A sampler with the run's keys, and a cache for `model`.
    pub fn sampler(&self, cx: &Cx, model: &Decoder) -> Result<Engine> {
        let keys = &self.keys;
        let sampling = SamplingOptions {
            temperature: keys.temperature,
            top_k: keys.top_k,
            top_p: keys.top_p,
            min_p: keys.min_p.unwrap_or(0.0),
            repetition_penalty: keys.repetition_penalty,
        };
        let sampling = sampling.seeded(self.seed);
        if sampling.truncates() {
            eprintln!(
                "note: sampling is truncated or penalised; ratios are of the full distribution at the sampling \
                 temperature, as TRL's are, so the policy is slightly off its sampler"
            );
        }
        let options = EngineOptions::new(
            keys.max_completion_length,
            sampling,
            self.stop.clone(),
            keys.max_sequences,
        );
        // The engine only makes sure that positions are covered, and they are.
        Engine::new(cx, &mut model.clone(), options, self.longest())
    }

    /// Exchanges the sampler for one of another model, and back.
    pub fn swap_sampler(&mut self, other: &mut Option<Engine>) {
        std::mem::swap(&mut self.engine, other);
    }

    /// The prompts of a generation: `count` of them, in the order of the epoch that the generation
    /// is in.
    pub fn prompts_of(&self, generation: u64, count: usize) -> Vec<usize> {
        let each = self.generations_an_epoch(count) as u64;
        let (epoch, at) = (generation / each, (generation % each) as usize * count);
        let order = epoch_order(self.order, self.train.len(), self.seed, epoch as u32);
        order.into_iter().cycle().skip(at).take(count).collect()
    }

    /// Whole generations that the data gives an epoch, at least one.
    pub fn generations_an_epoch(&self, count: usize) -> usize {
        (self.train.len() / count.max(1)).max(1)
    }

    /// `n` completions of each prompt of `set`, side by side. Draws follow from (seed, `draw`).
    #[allow(clippy::too_many_arguments)]
    pub fn generate(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        set: Set,
        prompts: &[usize],
        n: usize,
        draw: u64,
        greedy: bool,
    ) -> Result<Vec<Rollout>> {
        let begin = Instant::now();
        let Some(engine) = self.engine.as_mut() else {
            return Err(Error::Run("the sampler was not made; attach comes first".into()));
        };
        let of = |i: usize| if set == Set::Train { &self.train[i] } else { &self.eval[i] };
        let requests = Request::numbered(prompts.iter().map(|p| of(*p).ids.clone()), n);
        // Every generation has its own stream of draws.
        engine.set_seed(self.seed ^ (draw + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))?;
        let sampling = engine.options.sampling.clone();
        if greedy {
            engine.options.sampling = Sampling::greedy();
        }
        let done = engine.generate(cx, model, &requests);
        engine.options.sampling = sampling;
        let tokenizer = &self.tokenizer;
        let rollouts = done?
            .into_iter()
            .map(|c| {
                Ok(Rollout {
                    prompt: prompts[c.request],
                    text: tokenizer.decode(&c.ids, true)?,
                    ids: c.ids,
                    logps: c.logps_scaled,
                    entropies: c.entropies,
                    finished: c.finish == Finish::Stop,
                })
            })
            .collect::<Result<Vec<_>>>();
        self.seconds.generate += begin.elapsed().as_secs_f64();
        rollouts
    }

    /// Every reward of every rollout. Errors of a reward name the row.
    pub fn score(&mut self, cx: &mut Cx, set: Set, rollouts: &[Rollout]) -> Result<Scores> {
        let begin = Instant::now();
        let prompts = if set == Set::Train { &self.train } else { &self.eval };
        let mut batch = RewardBatch::default();
        for r in rollouts {
            let Prompt { value, columns, .. } = &prompts[r.prompt];
            batch.push(value, columns.iter(), &r.text, r.ids.clone());
        }
        let mut scores = self.rewards.score(&batch)?;
        if let Some(model) = &mut self.reward_model {
            let each = model.score(cx, &batch)?.into_iter().map(|s| Some(f64::from(s))).collect();
            scores.each.push(each);
            scores.names.push("reward_model".into());
            let weights = self.keys.reward_weights.as_ref();
            scores.weights.push(weights.and_then(|w| w.last().copied()).unwrap_or(1.0));
        }
        self.seconds.score += begin.elapsed().as_secs_f64();
        Ok(scores)
    }

    /// Log-probs under a model at the sampling temperature, rollout by rollout, without a tape.
    pub fn logps(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        rollouts: &[Rollout],
        rows: usize,
    ) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::with_capacity(rollouts.len());
        for some in rollouts.chunks(rows.max(1)) {
            let samples: Vec<(usize, &[u32])> =
                some.iter().map(|r| (r.prompt, r.ids.as_slice())).collect();
            let batch = self.batch(cx, model, &samples)?;
            let hidden = model.target_hidden(cx, &batch)?;
            let out = head_logps(cx, &hidden, &model.head, &batch.targets, self.scale())?
                .logp
                .to_f32()?;
            let mut rest = out.as_slice();
            for r in some {
                let (own, tail) = rest.split_at(r.ids.len());
                all.push(own.to_vec());
                rest = tail;
            }
        }
        Ok(all)
    }

    /// A packed batch of (prompt, completion): completions of one prompt that stand side by side
    /// share its rows.
    pub fn batch(&self, cx: &Cx, model: &Decoder, samples: &[(usize, &[u32])]) -> Result<Batch> {
        let mut groups: Vec<Group> = Vec::new();
        let mut last = None;
        for (prompt, ids) in samples {
            let completion = Sequence { ids, target: None };
            match groups.last_mut() {
                Some(group) if last == Some(*prompt) => group.completions.push(completion),
                _ => groups.push(Group {
                    prompt: &self.train[*prompt].ids,
                    completions: vec![completion],
                }),
            }
            last = Some(*prompt);
        }
        Batch::grouped(cx, &groups, model.vocab())
    }

    /// What logits are multiplied by: 1 / temperature, as the sampler does.
    pub fn scale(&self) -> f32 {
        1.0 / self.keys.temperature as f32
    }

    /// TRL's metrics of a generation.
    pub fn metrics(&self, rollouts: &[Rollout], scores: &Scores) -> Vec<Metric> {
        let mut out: Vec<Metric> = Vec::new();
        let mut put = |name: String, value: f64| {
            if value.is_finite() {
                out.push((name.into(), value));
            }
        };
        let lengths = |only: bool| -> Vec<f64> {
            rollouts.iter().filter(|r| !only || r.finished).map(|r| r.ids.len() as f64).collect()
        };
        for (name, all) in [("", lengths(false)), ("_terminated", lengths(true))] {
            if all.is_empty() {
                continue;
            }
            put(
                format!("completions/mean{name}_length"),
                all.iter().sum::<f64>() / all.len() as f64,
            );
            put(
                format!("completions/min{name}_length"),
                all.iter().copied().fold(f64::INFINITY, f64::min),
            );
            put(format!("completions/max{name}_length"), all.iter().copied().fold(0.0, f64::max));
        }
        let cut = rollouts.iter().filter(|r| !r.finished).count();
        put("completions/clipped_ratio".into(), cut as f64 / rollouts.len().max(1) as f64);
        for (name, each) in scores.names.iter().zip(&scores.each) {
            let (mean, std) = mean_std(each);
            put(format!("rewards/{name}/mean"), mean);
            put(format!("rewards/{name}/std"), std);
        }
        let (mean, std) = mean_std(&scores.total());
        put("reward".into(), mean);
        put("reward_std".into(), std);
        out
    }

    /// Lines of completions.jsonl, and with `log_completions` the best and the worst on the
    /// terminal.
    pub fn record(&mut self, rollouts: &[Rollout], scores: &Scores, advantages: &[f64]) {
        let total = scores.total();
        for (i, r) in rollouts.iter().enumerate() {
            let each: Map<String, Value> = scores
                .names
                .iter()
                .zip(&scores.each)
                .map(|(n, e)| (n.clone(), json!(e[i])))
                .collect();
            self.log.push(json!({
                "prompt": self.train[r.prompt].value, "completion": r.text, "reward": total[i], "rewards": each,
                "advantage": advantages.get(i), "finished": r.finished,
            }));
        }
        if !self.keys.log_completions {
            return;
        }
        let known = |i: &usize| total[*i].is_some_and(f64::is_finite);
        let by =
            |a: &usize, b: &usize| total[*a].unwrap_or(0.0).total_cmp(&total[*b].unwrap_or(0.0));
        let rows: Vec<usize> = (0..rollouts.len()).filter(known).collect();
        for (word, i) in
            [("best", rows.iter().copied().max_by(by)), ("worst", rows.iter().copied().min_by(by))]
        {
            if let Some(i) = i {
                let text = rollouts[i].text.replace('\n', " ");
                eprintln!("{word} completion, reward {:.3}: {text}", total[i].unwrap_or(0.0));
            }
        }
    }

    /// The time split since it was last asked for.
    pub fn take_seconds(&mut self) -> Vec<Metric> {
        let s = std::mem::take(&mut self.seconds);
        vec![
            ("time/generate".into(), s.generate),
            ("time/score".into(), s.score),
            ("time/train".into(), s.train),
        ]
    }

    /// Mean rewards over the evaluation prompts, one completion each.
    pub fn evaluate(&mut self, cx: &mut Cx, model: &Decoder) -> Result<Vec<Metric>> {
        let prompts: Vec<usize> = (0..self.eval.len()).collect();
        let rollouts = self.generate(cx, model, Set::Eval, &prompts, 1, u64::MAX - 1, false)?;
        let scores = self.score(cx, Set::Eval, &rollouts)?;
        self.seconds = Seconds::default();
        Ok(self.metrics(&rollouts, &scores))
    }
}

/// Which prompts an index means.
#[derive(Clone, Copy, PartialEq)]
pub enum Set {
    Train,
    Eval,
}

fn prompt(row: &Row, renderer: &Renderer) -> Result<Prompt> {
    let RenderedPrompt { ids, content } = renderer.prompt(row)?;
    let value = match content {
        Content::Text(text) => json!(text),
        Content::Chat(messages) => Value::Array(messages),
    };
    let mut columns = row.value.clone();
    columns.shift_remove("prompt");
    Ok(Prompt { ids, value, columns, source: row.place() })
}
