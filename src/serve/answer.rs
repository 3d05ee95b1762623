//! An answer in progress: turns events into pieces of text and log-probs. Layer 9.
//!
//! Invariant: a complete answer is the concatenation of the pieces that a stream of it would have.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::error::ApiError;
use super::events::Event;
use super::request::Asked;
use super::text::ChoiceText;
use super::ticket::Ticket;
use super::tools::{CallReader, ToolCall};
use crate::data::tokenizer::Tokenizer;
use crate::error::Error;
use crate::rollout::Finish;

/// A token for `logprobs`.
pub(super) struct TokenInfo {
    pub text: String,
    /// None for the first token of a prompt, which nothing predicts.
    pub logp: Option<f32>,
    /// Characters of the choice's text before the token.
    pub offset: usize,
    /// The most probable tokens, best first.
    pub top: Vec<(String, f32)>,
}

/// The log-probs of a prompt's tokens from the second on, and the most probable tokens at each
/// position.
type PromptScores = (Vec<f32>, Vec<Vec<(u32, f32)>>);

/// New text, calls and tokens of a choice.
pub(super) struct Delta {
    pub choice: usize,
    pub text: String,
    pub calls: Vec<ToolCall>,
    pub tokens: Vec<TokenInfo>,
    pub finish: Option<FinishReason>,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FinishReason {
    Stop,
    Length,
    ToolCalls,
}

pub(super) struct Answer {
    pub asked: Asked,
    pub ticket: Ticket,
    pub completion_tokens: usize,
    tokenizer: Arc<Tokenizer>,
    /// By choice; None: the choice has ended.
    texts: Vec<Option<ChoiceText>>,
    /// By choice; empty unless tool calls are reported.
    readers: Vec<CallReader>,
    left: usize,
    first_token: bool,
}

impl Answer {
    pub fn new(asked: Asked, ticket: Ticket) -> Answer {
        let tokenizer = ticket.app.models[asked.model].text.tokenizer.clone();
        let prompt_tokens: usize = asked.prompts.iter().map(|p| p.ids.len()).sum();
        ticket.app.metrics.prompt_tokens.fetch_add(prompt_tokens as u64, Ordering::Relaxed);
        let texts = (0..asked.choices()).map(|_| Some(ChoiceText::new(&asked.stop, 0))).collect();
        let left = asked.choices();
        let told = if asked.calls { left } else { 0 };
        let readers = (0..told).map(|_| CallReader::default()).collect();
        let (completion_tokens, first_token) = (0, true);
        Answer { asked, ticket, completion_tokens, tokenizer, texts, readers, left, first_token }
    }

    /// Whether all choices have ended.
    pub fn is_done(&self) -> bool {
        self.left == 0
    }

    /// Whether the worker must compute anything.
    pub fn needs_worker(&self) -> bool {
        self.asked.score().is_some() || self.asked.options.max_new_tokens > 0
    }

    /// The part of the answer that needs no event: an echoed prompt.
    pub fn begin(&mut self) -> Result<Vec<Delta>, ApiError> {
        if !self.asked.echo || self.asked.score().is_some() {
            return Ok(Vec::new());
        }
        (0..self.asked.prompts.len())
            .map(|prompt| self.echo(prompt, None))
            .collect::<Result<Vec<_>, _>>()
            .map(|all| all.into_iter().flatten().collect())
    }

    pub fn on(&mut self, event: Event) -> Result<Vec<Delta>, ApiError> {
        match event {
            Event::Token { choice, token, logp, top } => {
                self.token(choice, token, logp, &top).map_err(ApiError::internal)
            }
            Event::Done { choice, ids, finish } => {
                self.completion_tokens += ids.len();
                let (text, each) = (self.texts[choice].take(), self.asked.each_token());
                let text = text.map(|mut text| match each {
                    true => text.finish(&self.tokenizer),
                    false => text.whole(&self.tokenizer, &ids),
                });
                let text = text.transpose();
                let text = text.map_err(ApiError::internal)?.unwrap_or_default();
                self.end_one();
                let (mut text, calls) = self.part(choice, text);
                let reader = self.readers.get_mut(choice);
                let made = reader.as_ref().is_some_and(|reader| reader.made_calls());
                text += &reader.map(CallReader::finish).unwrap_or_default();
                let finish = Some(match finish {
                    Finish::Stop if made => FinishReason::ToolCalls,
                    Finish::Stop => FinishReason::Stop,
                    Finish::Length => FinishReason::Length,
                });
                Ok(vec![Delta { choice, text, calls, tokens: Vec::new(), finish }])
            }
            Event::Scored { prompt, logps, top } => self.echo(prompt, Some((logps, top))),
            Event::Failed(message) => {
                self.ticket.ended = true; // the worker has already dropped the request
                Err(ApiError::internal(message))
            }
        }
    }

    /// Splits text of a choice into content and calls.
    fn part(&mut self, choice: usize, text: String) -> (String, Vec<ToolCall>) {
        match self.readers.get_mut(choice) {
            Some(reader) => reader.push(&text),
            None => (text, Vec::new()),
        }
    }

    fn end_one(&mut self) {
        self.left -= 1;
        self.ticket.ended = self.left == 0;
    }

    fn token(
        &mut self,
        choice: usize,
        token: u32,
        logp: f32,
        top: &[(u32, f32)],
    ) -> Result<Vec<Delta>, Error> {
        let metrics = &self.ticket.app.metrics;
        if std::mem::take(&mut self.first_token) {
            metrics.first_token_time.observe(self.ticket.began.elapsed());
        }
        if !self.asked.each_token() {
            return Ok(Vec::new());
        }
        let tokenizer = &self.tokenizer;
        let Some(own) = &mut self.texts[choice] else { return Ok(Vec::new()) };
        let mut tokens = Vec::new();
        if self.asked.logprobs.is_some() {
            let (text, offset) = own.piece(tokenizer, token)?;
            let top = named(tokenizer, top)?;
            tokens.push(TokenInfo { text, logp: Some(logp), offset, top });
        }
        let text = own.push(tokenizer, token)?;
        let (text, calls) = self.part(choice, text);
        Ok(vec![Delta { choice, text, calls, tokens, finish: None }])
    }

    /// The prompt as the beginning of its choices.
    fn echo(
        &mut self,
        prompt: usize,
        scores: Option<PromptScores>,
    ) -> Result<Vec<Delta>, ApiError> {
        let asked = &self.asked.prompts[prompt];
        let text = match &asked.text {
            Some(text) => text.clone(),
            None => self.tokenizer.decode(&asked.ids, true).map_err(ApiError::internal)?,
        };
        let chars = text.chars().count();
        let ends = self.asked.options.max_new_tokens == 0;
        let mut deltas = Vec::new();
        for choice in prompt * self.asked.n..(prompt + 1) * self.asked.n {
            let tokens = match &scores {
                Some((logps, top)) => prompt_tokens(&self.tokenizer, &asked.ids, logps, top),
                None => Ok(Vec::new()),
            };
            let tokens = tokens.map_err(ApiError::internal)?;
            let finish = ends.then_some(FinishReason::Length);
            deltas.push(Delta { choice, text: text.clone(), calls: Vec::new(), tokens, finish });
            self.texts[choice] = (!ends).then(|| ChoiceText::new(&self.asked.stop, chars));
        }
        if ends {
            (0..self.asked.n).for_each(|_| self.end_one());
        }
        Ok(deltas)
    }
}

fn prompt_tokens(
    tokenizer: &Tokenizer,
    ids: &[u32],
    logps: &[f32],
    top: &[Vec<(u32, f32)>],
) -> Result<Vec<TokenInfo>, Error> {
    let mut text = ChoiceText::new(&[], 0);
    let token = |(i, id): (usize, &u32)| {
        let (piece, offset) = text.piece(tokenizer, *id)?;
        text.push(tokenizer, *id)?;
        let before = i.checked_sub(1); // the first token has no log-prob
        let logp = before.and_then(|i| logps.get(i)).copied();
        let top = before.and_then(|i| top.get(i)).map_or(&[][..], Vec::as_slice);
        Ok(TokenInfo { text: piece, logp, offset, top: named(tokenizer, top)? })
    };
    ids.iter().enumerate().map(token).collect()
}

fn named(tokenizer: &Tokenizer, top: &[(u32, f32)]) -> Result<Vec<(String, f32)>, Error> {
    top.iter().map(|(id, logp)| Ok((tokenizer.decode(&[*id], false)?, *logp))).collect()
}
