//! A reward model in the loop: a sequence classifier's score of prompt and completion. Layer 6.
//!
//! Invariant: it reads what its own training rows looked like: its own tokenizer and chat template
//! write prompt and completion again, so it need not share the policy's.

use std::path::Path;

use serde_json::{Value, json};

use crate::autograd::Cx;
use crate::data::chat::{ChatTemplate, RenderOptions};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::ops::embedding::gather_rows;
use crate::rewards::Batch as Rows;
use crate::tensor::ParamSetId;

pub struct RewardModel {
    model: Decoder,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

/// Rows of a forward, at most: scoring needs no more at once.
const TOKENS: usize = 8192;

impl RewardModel {
    /// Reads a folder. Error: it is no reward model (one label).
    pub fn load(cx: &Cx, dir: &Path) -> Result<RewardModel> {
        let model = Decoder::folder(dir)?.set(ParamSetId::Reward).build(cx)?;
        if model.config.task != (Task::SequenceClassification { labels: 1 }) {
            let message = "is no reward model: it must be a sequence classifier with num_labels 1 (`temper reward` makes one)";
            return Err(Error::model(dir, message));
        }
        let tokenizer = Tokenizer::load(dir)?;
        let template =
            tokenizer.chat_template().map(|_| ChatTemplate::of(&tokenizer)).transpose()?;
        Ok(RewardModel { model, tokenizer, template })
    }

    /// The trunk and score, for a value model that starts as this.
    pub fn decoder(&self) -> &Decoder {
        &self.model
    }

    /// The score of each completion, read at its last token.
    pub fn score(&mut self, cx: &mut Cx, rows: &Rows) -> Result<Vec<f32>> {
        let ids = (0..rows.len())
            .map(|i| self.ids(&rows.prompts[i], &rows.completion_text(i)))
            .collect::<Result<Vec<_>>>()?;
        self.model.ensure_positions(cx, ids.iter().map(Vec::len).max().unwrap_or(1))?;
        let mut scores = Vec::with_capacity(ids.len());
        let mut from = 0;
        while from < ids.len() {
            let mut to = from + 1;
            let mut tokens = ids[from].len();
            while to < ids.len() && tokens + ids[to].len() <= TOKENS {
                tokens += ids[to].len();
                to += 1;
            }
            scores.extend(self.forward(cx, &ids[from..to])?);
            from = to;
        }
        Ok(scores)
    }

    fn forward(&self, cx: &mut Cx, ids: &[Vec<u32>]) -> Result<Vec<f32>> {
        let sequences: Vec<Sequence> =
            ids.iter().map(|ids| Sequence { ids, target: None }).collect();
        let batch = Batch::new(cx, &sequences, self.model.config.vocab_size)?;
        let hidden = self.model.hidden(cx, &batch)?;
        let ends = ids.iter().scan(0, |at, ids| {
            *at += ids.len() as i32;
            Some(*at - 1)
        });
        let ends = cx.ints("last rows", &ends.collect::<Vec<_>>())?;
        let last = gather_rows(cx, &hidden, &ends)?;
        self.model.scores(cx, &last)?.to_f32()
    }

    fn ids(&self, prompt: &Value, completion: &str) -> Result<Vec<u32>> {
        match prompt {
            Value::Array(messages) => {
                let Some(template) = &self.template else {
                    return Err(Error::model(
                        self.tokenizer.dir(),
                        "has no chat template, the prompts are conversations",
                    ));
                };
                let mut messages = messages.clone();
                messages.push(json!({ "role": "assistant", "content": completion }));
                let text = template.render(&Value::Array(messages), RenderOptions::default())?.text;
                self.tokenizer.encode(&text, false)
            }
            prompt => {
                let eos = self.tokenizer.eos_token().unwrap_or_default();
                self.tokenizer.encode(
                    &format!("{}{completion}{eos}", prompt.as_str().unwrap_or_default()),
                    true,
                )
            }
        }
    }
}
