//! Evaluation: the quality of a model on rows, and its scores of single rows. Layer 6.
//!
//! Invariant: the kind of rows decides the metrics: prompts are completed and verified, texts give
//! a perplexity, pairs the accuracy of a reward model, questions with choices an accuracy. Every
//! row that a metric leaves out is counted. Nothing is printed here.
//!
//! | rows | function | metrics |
//! |---|---|---|
//! | prompt (and an answer) | [`answers`] | the mean of each reward, pass@k |
//! | text, messages, prompt and completion | [`perplexity`] | loss, perplexity, tokens |
//! | chosen and rejected | [`preferences`] | accuracy and margin of a reward model |
//! | question, choices, answer | [`evaluate_questions`] | acc, acc_norm |
//! | any of these, or input_ids | [`score`] | none: log-probs or scores, row by row |

mod answers;
mod choices;
mod options;
mod preferences;
mod result;
mod score;

use crate::autograd::Cx;
use crate::data::format::Format;
use crate::data::render::ModelText;
use crate::data::rows::Row;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::rewards::model::one_score;
use choices::choose;

pub use answers::{answers, pass_at_k};
pub use choices::are_questions;
pub use options::EvalOptions;
pub use preferences::preferences;
pub use result::{EvalMetric, EvalRow, Evaluation, SkippedRows};
pub use score::{RowScore, perplexity, score, sequences};

/// [`evaluate`] for multiple-choice questions, with few-shot examples from `examples`. Errors: the
/// model is not a language model; rows are not questions.
pub fn evaluate_questions(
    cx: &mut Cx,
    model: &mut Decoder,
    text: &ModelText,
    rows: &[Row],
    examples: &[Row],
    options: &EvalOptions,
) -> Result<Evaluation> {
    if model.config.task != Task::CausalLm {
        return Err(Error::model(
            text.tokenizer.dir(),
            "is not a language model; questions with choices need one",
        ));
    }
    choose(cx, model, text, rows, examples, options)
}

/// Evaluates a model, whose tokenizer and templates are `text`, on rows of the kind `format`, which
/// decides the metrics. Errors: the rows need a model of another task; several greedy completions
/// are requested.
pub fn evaluate(
    cx: &mut Cx,
    model: &mut Decoder,
    text: &ModelText,
    rows: &[Row],
    format: Format,
    options: &EvalOptions,
) -> Result<Evaluation> {
    match format {
        Format::Preference => {
            one_score(&model.config)?;
            preferences(cx, model, text, rows, options)
        }
        _ if model.config.task != Task::CausalLm => Err(Error::model(
            text.tokenizer.dir(),
            "is not a language model; a classifier is evaluated on rows with chosen and rejected",
        )),
        Format::PromptOnly => answers(cx, model, text, rows, options),
        _ => {
            let text_field = &options.eval.dataset_text_field;
            let (sequences, bad) = sequences(
                rows,
                text,
                model.config.vocab_size,
                text_field,
                options.data.on_bad_row,
            )?;
            let found = perplexity(cx, model, &sequences, options.batch_tokens)?;
            Ok(Evaluation { bad, ..found })
        }
    }
}
