//! Generation: the trainer's forward over a paged cache, one step at a time. Floor 4.
//!
//! Invariant: a sequence's tokens and log-probs depend on its prompt, its number and the seed alone, not on what else is
//! in the batch; its log-probs are the trainer's, bit for bit (one forward, one set of weights).

pub mod sample;

use crate::cx::Cx;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::kv::{CachedSequence, KvCache, PAGE};
use crate::ops::embedding::gather_rows;
use crate::ops::head::token_logps;
use sample::Sampling;

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end token, which is the completion's last.
    Stop,
    /// max_new_tokens.
    Length,
}

#[derive(Clone, Debug)]
pub struct Completion {
    pub ids: Vec<u32>,
    /// log p of each token under the model's full distribution at temperature 1.
    pub logps: Vec<f32>,
    pub finish: Finish,
}

/// How to generate.
#[derive(Clone, Debug)]
pub struct Options {
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// Tokens that end a completion.
    pub stop: Vec<u32>,
    /// Sequences decoded at once.
    pub batch: usize,
}

struct Running {
    number: usize,
    cached: CachedSequence,
    /// Tokens not yet in the cache: the prompt at first, then the last token.
    pending: Vec<u32>,
    completion: Completion,
}

/// Completes every prompt (none empty). `done` hears of each completion as it ends: (prompt number, completion).
/// Prompts wait for room: at most `options.batch` run at once, and as many pages are taken as the longest of them need.
pub fn generate(
    cx: &mut Cx,
    model: &mut Decoder,
    prompts: &[Vec<u32>],
    options: &Options,
    mut done: impl FnMut(usize, &Completion),
) -> Result<Vec<Completion>> {
    if let Some(empty) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::op("generate", format!("prompt {empty} has no tokens; give at least a BOS token")));
    }
    let total = |p: &Vec<u32>| p.len() + options.max_new_tokens;
    let longest = prompts.iter().map(total).max().unwrap_or(0);
    model.ensure_positions(cx, longest)?;
    let batch = options.batch.clamp(1, prompts.len().max(1));
    let mut cache = KvCache::new(cx, &model.config, batch * longest.div_ceil(PAGE))?;
    let mut results: Vec<Option<Completion>> = vec![None; prompts.len()];
    let mut running: Vec<Running> = Vec::new();
    let mut next = 0;
    while next < prompts.len() || !running.is_empty() {
        while running.len() < batch && next < prompts.len() {
            let mut cached = CachedSequence::default();
            if !cache.reserve(&mut cached, total(&prompts[next])) {
                break;
            }
            let completion = Completion { ids: Vec::new(), logps: Vec::new(), finish: Finish::Length };
            running.push(Running { number: next, cached, pending: prompts[next].clone(), completion });
            next += 1;
        }
        step(cx, model, &cache, &mut running, options)?;
        let mut i = 0;
        while i < running.len() {
            let c = &mut running[i].completion;
            if c.ids.last().is_some_and(|t| options.stop.contains(t)) {
                c.finish = Finish::Stop;
            } else if c.ids.len() < options.max_new_tokens {
                i += 1;
                continue;
            }
            let mut ended = running.remove(i);
            cache.release(&mut ended.cached);
            done(ended.number, &ended.completion);
            results[ended.number] = Some(ended.completion);
        }
    }
    Ok(results.into_iter().flatten().collect())
}

/// One step: every running sequence's pending tokens go in, one token comes out of each.
fn step(cx: &mut Cx, model: &Decoder, cache: &KvCache, running: &mut [Running], options: &Options) -> Result<()> {
    let pending: Vec<Vec<u32>> = running.iter_mut().map(|r| std::mem::take(&mut r.pending)).collect();
    let tokens: Vec<&[u32]> = pending.iter().map(Vec::as_slice).collect();
    let mut cached: Vec<&mut CachedSequence> = running.iter_mut().map(|r| &mut r.cached).collect();
    let kv = cache.step(cx, &mut cached, &tokens, model.config.vocab_size)?;
    let mut hidden = model.cached(cx, cache, &kv)?;
    if hidden.row_count() > running.len() {
        // Only the last token of each sequence predicts.
        let ends = tokens.iter().scan(0, |at, t| {
            *at += t.len() as i32;
            Some(*at - 1)
        });
        let ends = cx.ints("last rows", &ends.collect::<Vec<_>>())?;
        hidden = gather_rows(cx, &hidden, &ends)?;
    }
    let logits = model.logits(cx, &hidden)?;
    let rows = logits.to_f32()?;
    let vocab = logits.cols();
    let chosen: Vec<u32> = running
        .iter()
        .zip(rows.chunks_exact(vocab))
        .map(|(r, row)| options.sampling.draw(row, r.number, r.completion.ids.len()))
        .collect();
    let target = cx.ints("targets", &chosen.iter().map(|t| *t as i32).collect::<Vec<_>>())?;
    let logps = token_logps(cx, &logits, &target)?.to_f32()?;
    for ((r, token), logp) in running.iter_mut().zip(chosen).zip(logps) {
        r.completion.ids.push(token);
        r.completion.logps.push(logp);
        r.pending.push(token);
    }
    Ok(())
}
