//! Completions of several turns: the model speaks, an environment answers, the model continues.
//! Layer 7.
//!
//! Token-in, token-out: sampled tokens are never changed; the environment's answer becomes the
//! tokens that the chat template writes between two turns (`data::continuation`), and generation
//! continues from the same cache. Those tokens are context, never targets.
//!
//! Invariant: an episode's tokens depend on weights, seed, its row and the environment's answers,
//! not on when an answer arrives: while one sequence waits, others run.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::prompts::Prompt;
use super::rollout::{Conversation, Rollout};
use crate::autograd::Cx;
use crate::config::EnvironmentOptions;
use crate::data::chat::ChatTemplate;
use crate::data::continuation::Talk;
use crate::data::format::{Format, ParsedRow};
use crate::data::render::Renderer;
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::methods::MethodInputs;
use crate::model::decoder::Decoder;
use crate::rewards::{Environment, EnvironmentAnswer, EnvironmentTurn};
use crate::rng::{philox, tag};
use crate::rollout::{Completion, Engine, Finish};
use crate::signals::Stop;

/// The environment of a run, and what is needed to turn its answers into tokens.
pub struct Episodes {
    environment: Environment,
    template: Option<ChatTemplate>,
    vocab: usize,
    /// The most answers after which a completion continues.
    answers: Option<usize>,
    max_completion_length: usize,
    seed: u64,
}

/// The completions of a generation.
pub struct EpisodeBatch<'a> {
    pub prompts: &'a [Prompt],
    /// The prompts that are completed, `n` times each.
    pub indices: &'a [usize],
    pub n: usize,
    /// The generation's stream of random numbers.
    pub stream: u64,
    pub tokenizer: &'a Tokenizer,
}

/// A completion in progress.
struct Episode {
    prompt: usize,
    row: Row,
    example: ParsedRow,
    /// The prompt's messages and those that followed; empty if the prompt is a text.
    messages: Vec<Value>,
    /// The text that followed a prompt that is a text.
    text: String,
    talk: Conversation,
    /// How many of the sampled tokens `talk` contains.
    taken: usize,
    /// Whether no turn follows.
    last: bool,
    /// Its completion, if the length limit ended it.
    cut: Option<Completion>,
}

impl Episodes {
    /// None if the options name no environment.
    pub fn new(
        options: &EnvironmentOptions,
        max_completion_length: usize,
        seed: u64,
        inputs: &MethodInputs,
    ) -> Result<Option<Episodes>> {
        let Some(command) = &options.environment else { return Ok(None) };
        let seconds = options.environment_timeout;
        let timeout = Duration::try_from_secs_f64(seconds).map_err(|_| {
            Error::Config(format!("environment_timeout = {seconds}: must be a number of seconds"))
        })?;
        Ok(Some(Episodes {
            environment: Environment::new(command, timeout, options.environment_restarts),
            template: ChatTemplate::of_run(inputs.tokenizer, inputs.setup)?,
            vocab: inputs.model.vocab_size,
            answers: options.max_tool_calling_iterations,
            max_completion_length,
            seed,
        }))
    }

    /// See [`Environment::govern`].
    pub fn govern(&mut self, stop: &Stop, env: Option<&[String]>) {
        self.environment.govern(stop, env);
    }

    /// Completes every request of `engine`, which has those of `batch` and no others. Calls `done`
    /// for each completion as it ends.
    pub fn run(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        engine: &mut Engine,
        batch: &EpisodeBatch,
        done: &mut dyn FnMut(usize, &Rollout),
    ) -> Result<Vec<Rollout>> {
        self.environment.clear();
        let mut episodes = self.begin(batch)?;
        let mut rollouts: Vec<Option<Rollout>> = vec![None; episodes.len()];
        let observer = cx.observer.clone();
        loop {
            let mut wait = !engine.has_work();
            while let Some((i, answer)) = self.environment.hear(wait, &*observer)? {
                wait = false;
                if let Some(completion) =
                    self.answered(engine, batch, &mut episodes[i], i, answer)?
                {
                    self.environment.close(i);
                    let rollout = episodes[i].rollout(batch, completion)?;
                    done(i, &rollout);
                    rollouts[i] = Some(rollout);
                }
            }
            if engine.has_work() {
                let stepped = engine.step(cx, model)?;
                for turn in stepped.turns {
                    let i = turn.request * batch.n + turn.member;
                    self.turn(batch, &mut episodes[i], i, &turn.ids, false)?;
                }
                for completion in stepped.done {
                    let i = completion.request * batch.n + completion.member;
                    self.turn(batch, &mut episodes[i], i, &completion.ids, true)?;
                    episodes[i].cut = Some(completion);
                }
            } else if !self.environment.owes() {
                break;
            }
        }
        let all: Option<Vec<Rollout>> = rollouts.into_iter().collect();
        all.ok_or_else(|| Error::Run("the environment left an episode without an answer".into()))
    }

    /// One episode per completion. Those of one prompt share a seed, so that they differ only by
    /// what the model says.
    fn begin(&mut self, batch: &EpisodeBatch) -> Result<Vec<Episode>> {
        let mut episodes = Vec::with_capacity(batch.indices.len() * batch.n);
        for (group, index) in batch.indices.iter().enumerate() {
            let prompt = &batch.prompts[*index];
            let key = [self.seed as u32, (self.seed >> 32) as u32];
            let [low, high] = [batch.stream as u32, (batch.stream >> 32) as u32];
            let seed = philox(key, [group as u32, low, high, tag::ENVIRONMENT])[0] >> 1;
            for _ in 0..batch.n {
                let (i, place) = (episodes.len(), prompt.source.clone());
                self.environment.reset(i, place, seed, &prompt.value, &prompt.columns);
                episodes.push(Episode::new(*index, prompt)?);
            }
        }
        Ok(episodes)
    }

    /// Asks the environment at the end of a turn of the model.
    fn turn(
        &mut self,
        batch: &EpisodeBatch,
        episode: &mut Episode,
        i: usize,
        sampled: &[u32],
        truncated: bool,
    ) -> Result<()> {
        let ids = &sampled[episode.taken..];
        let text = batch.tokenizer.decode(ids, true)?;
        episode.taken = sampled.len();
        episode.add(ids, true);
        episode.talk.turns += 1;
        match episode.messages.is_empty() {
            true => episode.text.push_str(&text),
            false => episode.messages.push(json!({ "role": "assistant", "content": text })),
        }
        let turn = episode.talk.turns;
        episode.last = truncated || self.answers.is_some_and(|most| turn > most);
        let turn = EnvironmentTurn { turn, text: &text, ids, last: episode.last, truncated };
        self.environment.step(i, &turn);
        Ok(())
    }

    /// Handles the environment's answer; returns Some if the completion ends with it.
    fn answered(
        &self,
        engine: &mut Engine,
        batch: &EpisodeBatch,
        episode: &mut Episode,
        i: usize,
        answer: EnvironmentAnswer,
    ) -> Result<Option<Completion>> {
        let talk = &mut episode.talk;
        talk.reward = match (talk.reward, answer.reward) {
            (Some(sum), Some(more)) => Some(sum + more),
            (sum, more) => sum.or(more),
        };
        if let Some(cut) = episode.cut.take() {
            return Ok(Some(cut));
        }
        let (request, member) = (i / batch.n, i % batch.n);
        let observation = answer.observation.filter(|_| !answer.done && !episode.last);
        let Some(observation) = observation else {
            return engine.finish(request, member, Finish::Stop).map(Some);
        };
        let ids = self.tokens(batch.tokenizer, episode, &observation)?;
        if episode.talk.ids.len() + ids.len() >= self.max_completion_length {
            // No room for the answer and one more token.
            return engine.finish(request, member, Finish::Length).map(Some);
        }
        engine.resume(request, member, &ids)?;
        episode.add(&ids, false);
        match observation {
            Value::Array(messages) => episode.messages.extend(messages),
            text if episode.messages.is_empty() => {
                episode.text.push_str(text.as_str().unwrap_or_default());
            }
            text => episode.messages.push(message(text)),
        }
        Ok(None)
    }

    /// The tokens between one turn of the model and the next.
    fn tokens(
        &self,
        tokenizer: &Tokenizer,
        episode: &Episode,
        observation: &Value,
    ) -> Result<Vec<u32>> {
        let Some(stop) = episode.talk.ids.last() else { return Ok(Vec::new()) };
        let talk = Talk {
            renderer: Renderer::new(tokenizer, self.template.as_ref(), self.vocab),
            row: &episode.row,
            example: &episode.example,
            messages: &episode.messages,
            stop: *stop,
        };
        match observation {
            Value::String(text) if episode.messages.is_empty() => talk.behind_stop(text),
            Value::Array(messages) if !episode.messages.is_empty() => talk.continuation(messages),
            Value::String(_) => talk.continuation(&[message(observation.clone())]),
            _ => Err(episode.row.error(
                "has a text as its prompt, but the environment answered with messages; answer \
                 with a text, or give the prompt as messages",
            )),
        }
    }
}

/// The message for an observation that is a text, in a conversation.
fn message(text: Value) -> Value {
    json!({ "role": "user", "content": text })
}

impl Episode {
    fn new(index: usize, prompt: &Prompt) -> Result<Episode> {
        let (file, line) = prompt.source.rsplit_once(':').unwrap_or((&prompt.source, "0"));
        let mut value = prompt.columns.clone();
        value.insert("prompt".into(), prompt.value.clone());
        let row = Row { value, file: Path::new(file).into(), line: line.parse().unwrap_or(0) };
        let example = Format::PromptOnly.parse(&row, "")?;
        let messages = prompt.value.as_array().cloned().unwrap_or_default();
        Ok(Episode {
            prompt: index,
            row,
            example,
            messages,
            text: String::new(),
            talk: Conversation::default(),
            taken: 0,
            last: false,
            cut: None,
        })
    }

    fn add(&mut self, ids: &[u32], sampled: bool) {
        self.talk.ids.extend_from_slice(ids);
        self.talk.sampled.resize(self.talk.ids.len(), sampled);
    }

    fn rollout(&mut self, batch: &EpisodeBatch, c: Completion) -> Result<Rollout> {
        let mut talk = std::mem::take(&mut self.talk);
        let of_prompt = batch.prompts[self.prompt].value.as_array().map(Vec::len);
        talk.said = match of_prompt {
            Some(of_prompt) => Value::Array(self.messages.split_off(of_prompt)),
            None => json!(std::mem::take(&mut self.text)),
        };
        Ok(Rollout {
            prompt: self.prompt,
            text: batch.tokenizer.decode(&talk.ids, true)?,
            ids: c.ids,
            logps: c.logps_scaled,
            entropies: c.entropies,
            finished: c.finish == Finish::Stop,
            conversation: Some(Box::new(talk)),
        })
    }
}
