//! Reward models: a sequence classifier's score of token sequences, and of prompts and completions.
//! Layer 6.
//!
//! Invariant: a reward model reads rows in the form of its own training: its own tokenizer and chat
//! template render prompt and completion again, with the row's `tools` and `chat_template_kwargs`,
//! so they may differ from the policy's.

use std::path::Path;

use serde_json::Map;

use crate::autograd::Cx;
use crate::data::chat::{ChatTemplate, TemplateSetup};
use crate::data::format::{Format, RowContent};
use crate::data::packing::token_batches;
use crate::data::render::{EosToken, Renderer};
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::model::layout::{ModelConfig, Task};
use crate::ops::embedding::gather_rows;
use crate::rewards::RewardBatch;
use crate::tensor::ParamSetId;

/// A reward model with the tokenizer and chat template of its folder.
pub struct RewardModel {
    model: Decoder,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

/// Most tokens in one forward; scoring gains nothing from more.
const TOKENS: usize = 8192;

impl RewardModel {
    /// Loads a folder. `setup`: the variables that the run gives the template. Error: the model is
    /// not a reward model (with one label).
    pub fn load(cx: &Cx, dir: &Path, setup: &TemplateSetup) -> Result<RewardModel> {
        // Always uses Longrope's short factors: a score must not depend on earlier sequences.
        let model = Decoder::folder(dir)?.set(ParamSetId::Reward).positions(2).build(cx)?;
        if model.config.task != (Task::SequenceClassification { labels: 1 }) {
            let message = "is not a reward model: it must be a sequence classifier with num_labels 1 (`temper reward` makes one)";
            return Err(Error::model(dir, message));
        }
        let tokenizer = Tokenizer::load(dir)?;
        let template = ChatTemplate::of_run(&tokenizer, setup)?;
        Ok(RewardModel { model, tokenizer, template })
    }

    /// The trunk and score head, for a value model that starts from this model.
    pub fn decoder(&self) -> &Decoder {
        &self.model
    }

    /// The score of each completion, read at its last token.
    pub fn score(&mut self, cx: &mut Cx, rows: &RewardBatch) -> Result<Vec<f32>> {
        let ids = (0..rows.len()).map(|i| self.ids(rows, i)).collect::<Result<Vec<_>>>()?;
        let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        sequence_scores(cx, &mut self.model, &ids, TOKENS)
    }

    /// Runs as many sequences of these lengths as go through the model at once, for the memory
    /// plan.
    pub fn rehearse(&mut self, cx: &mut Cx, lengths: impl Iterator<Item = usize>) -> Result<()> {
        let mut sequences: Vec<Vec<u32>> = Vec::new();
        let mut total = 0;
        for length in lengths {
            total += length;
            sequences.push(vec![0; length.max(1)]);
            if total > TOKENS {
                break;
            }
        }
        let ids: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        sequence_scores(cx, &mut self.model, &ids, TOKENS).map(drop)
    }

    /// The tokens of completion `i` for the model: the row as `temper reward` would tokenise it.
    fn ids(&self, rows: &RewardBatch, i: usize) -> Result<Vec<u32>> {
        let prompt = &rows.prompts[i];
        let mut value = Map::new();
        value.insert("prompt".into(), prompt.clone());
        value.insert("completion".into(), rows.completions[i].clone());
        for field in ["tools", "chat_template_kwargs"] {
            let cell = rows.cell(field, i);
            if !cell.is_null() {
                value.insert(field.into(), cell.clone());
            }
        }
        let row = Row { value, file: Path::new("completion").into(), line: i + 1 };
        let example = Format::PromptCompletion.parse(&row, "")?;
        let RowContent::PromptCompletion { prompt, completion } = &example.content else {
            return Err(row.error("is not a prompt with a completion"));
        };
        let vocab = self.model.config.vocab_size;
        let renderer = Renderer::new(&self.tokenizer, self.template.as_ref(), vocab);
        let eos = EosToken::of(&self.tokenizer, None)?;
        renderer.whole(&row, &example, prompt, completion, eos)
    }
}

/// Error: the model is not a reward model, that is, a sequence classifier with one label.
pub fn one_score(model: &ModelConfig) -> Result<()> {
    match model.task {
        Task::SequenceClassification { labels: 1 } => Ok(()),
        other => Err(Error::Config(format!(
            "the model is {other:?}; a reward model has one label: set \"num_labels\": 1 (one name in id2label) in its \
             config.json, or start from a language model"
        ))),
    }
}

/// A reward model's score of each sequence, read at its last token, in order. At most `budget`
/// tokens, or one sequence, go through the model at once; a score does not depend on the rest of
/// the batch.
pub fn sequence_scores(
    cx: &mut Cx,
    model: &mut Decoder,
    sequences: &[&[u32]],
    budget: usize,
) -> Result<Vec<f32>> {
    let lengths: Vec<usize> = sequences.iter().map(|ids| ids.len()).collect();
    model.ensure_positions(cx, lengths.iter().copied().max().unwrap_or(1))?;
    let mut scores = Vec::with_capacity(sequences.len());
    for range in token_batches(&lengths, budget) {
        let sequences: Vec<Sequence> =
            sequences[range].iter().map(|ids| Sequence { ids, target: None }).collect();
        let batch = Batch::new(cx, &sequences, model.config.vocab_size)?;
        let hidden = model.hidden(cx, &batch)?;
        let ends = sequences.iter().scan(0, |end, s| {
            *end += s.ids.len() as i32;
            Some(*end - 1)
        });
        let ends = cx.ints("last tokens", &ends.collect::<Vec<_>>())?;
        let last = gather_rows(cx, &hidden, &ends)?;
        scores.extend(model.scores(cx, &last)?.to_f32()?);
    }
    Ok(scores)
}
